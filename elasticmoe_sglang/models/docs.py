"""docs/models.md from the architectures.

python -m elasticmoe_sglang.models.docs docs/models.md           write it
python -m elasticmoe_sglang.models.docs --check docs/models.md   exit status 1 where it differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from elasticmoe_sglang.generated_page import write_or_check
from elasticmoe_sglang.models import ARCHITECTURES, REFUSED
from elasticmoe_sglang.models.base import Architecture, Attention, grouped_query_kv
from elasticmoe_sglang.units import format_bytes

_TOKENS = "tests/e2e/test_scale_tokens.py::test_same_tokens_through_every_change"
_BF16 = "tests/e2e/test_scale_bfloat16.py::test_moved_requests_round_as_those_that_stay"
_KILLS = "tests/fault/test_kill_storm.py::test_kills_at_any_time_lose_nothing"
_KV = "tests/e2e/test_kv_elastic.py::test_kv_takes_and_gives_what_columns_leave_and_need"
_SHAPES = "tests/unit/test_model_shape.py::test_a_tiny_model_has_what_is_counted"
_POOLS: dict[Attention, str] = {
    "grouped queries": "qwen3_moe-paged",
    "grouped queries with sinks, windows in every other layer": "gpt_oss",
    "latent (MLA)": "deepseek_v2",
}

_HEAD = """# Models

Generated from `elasticmoe_sglang/models` by `make models-doc`; do not edit.

A model is served elastically if SGLang's model of it runs attention data-parallel, its routed experts lie in
`FusedMoE`, and every other weight can be held whole by every rank, or attention, embeddings and output in parts by the
ranks of a replica (`--elasticmoe-attention-tp`). Weights are float32 or bfloat16, or e4m3 in blocks
([below](#quantised-checkpoints)). `elasticmoe tiny-model --arch` makes a small random one of each architecture.

"""

_ADDING = """
## What a new architecture must answer

One file under `elasticmoe_sglang/models` answers as data (`base.Architecture`): what the fields of `config.json` are
called, what its attention, router and shared experts weigh and which KV pool they need, and how a tiny model of it is
drawn. From that come the launch's checks, the sizes that `configs` and `elasticmoe bench simulate` count with,
`elasticmoe tiny-model`, and this page.

What it cannot answer as data is what SGLang's model shards over the ranks beside the routed experts. Attention,
embeddings and dense layers follow SGLang's own flags (`--enable-dp-attention`, `--moe-dense-tp-size 1`, which an
elastic server sets). A shared expert mostly does not, and needs two hooks: one makes its layers whole, the other
computes it for the rank's own rows only, so that the sum over the ranks that follows counts it once, whoever the
ranks are (`elasticmoe_patches/worker/own_rows.py`).

An ordinary one is GLM-4.5: `elasticmoe_sglang/models/glm4_moe.py` with {glm4_data} lines,
`patches/elasticmoe_patches/srt/models/glm4_moe.py` with {glm4_hooks} lines for its shared expert, one line in
`elasticmoe_sglang/models/__init__.py`, its name in `Arch` of `tiny_model.py`, and the tests above by that name. gpt-oss
needed more, because its experts and its attention are others: biases in columns and kernels, checkpoints with all
experts in one tensor (`elasticmoe_patches/worker/stacked.py`), windows and sinks on the CPU.
"""


def render() -> str:
    """The whole page as Markdown."""
    served = ARCHITECTURES.values()
    return (
        f"{_HEAD}{_described(served)}\n## Tests\n{_TESTS_ARE}\n{_tested(served)}"
        f"{_QUANTISED}{_GPT_OSS.format(kv_20b=format_bytes(_KV_20B))}\n## Refused\n\n{_refused()}"
        f"{_ADDING.format(glm4_data=_lines(_GLM4_DATA), glm4_hooks=_lines(_GLM4_HOOKS))}"
    )


_KV_20B = 24 * grouped_query_kv({"num_key_value_heads": 8, "head_dim": 64}) * 2
"""Bytes of one token: 24 layers, two bytes an element."""
_ROOT = Path(__file__).resolve().parents[2]
_GLM4_DATA = "elasticmoe_sglang/models/glm4_moe.py"
_GLM4_HOOKS = "patches/elasticmoe_patches/srt/models/glm4_moe.py"
_REFERENCE_TEST = "tests/e2e/test_scale_reference.py"
_TESTS_ARE = """
Tokens are float32 and compared with plain SGLang's of the same version; the kill storm compares them with those of the
undisturbed server, while workers, HMM and standbys are killed. All but the sizes run servers and are in `make soak`
(`SGLANG=0.5.21` for that version). The KV pools are those of the attention, so one model of each stands for it.
`test_attention_tp.py` serves each with replicas of two ranks, through 2 -> 4 -> 2 and killed ranks.
"""


_QUANTISED = f"""
## Quantised checkpoints

Block-quantised fp8 as DeepSeek-V3 and Qwen3-*-FP8 ship it is served with every architecture above but gpt-oss: weights
in e4m3 with one float32 scale for each block of 128 x 128 (`"quant_method": "fp8"`, `"weight_block_size": [128, 128]`,
`"activation_scheme": "dynamic"`), router, norms, embeddings and output unquantised. A column holds weights and scales;
it moves, is read and is recovered like any other. Experts on GPUs are computed by this project's Triton kernels, which
quantise activations by token and group of 128 with float32 scales (also where `scale_fmt` is `ue8m0`); dense layers by
SGLang's Triton kernel (`--fp8-gemm-backend triton`). GPUs older than Ada are refused, and so are NPUs. On the CPU
platform weights are dequantised and activations stay as they are, in experts and dense layers, as in SGLang's own
operators for CPUs; float32 activations are possible there.

Refused with the reason: every other `quant_method`, fp8 with a scale for each tensor or channel, other block sizes,
static activation scales, widths of hidden states or experts that are no multiple of 128, `--quantization` of an
unquantised checkpoint, quantised KV caches, other backends of the dense layers.

`elasticmoe tiny-model --quantization fp8` makes a small one of each of these. `{_REFERENCE_TEST}`
compares tokens with those of transformers on the dequantised weights, through 2 -> 3 -> 1 -> 4 -> 2 and a killed rank;
`test_scale_tokens.py[qwen3_moe-fp8]` and `[deepseek_v3-fp8]`, in `make soak`, with plain SGLang's.
"""
_GPT_OSS = f"""
## gpt-oss

- **Checkpoints** are those in bfloat16 or float32. What OpenAI ships is mxfp4, which is refused at launch: columns hold
  what the kernels read. transformers writes a bfloat16 one if it loads that with `Mxfp4Config(dequantize=True)` and
  saves it.
- **Experts.** Such a checkpoint has all experts of a layer in one tensor, gate and up projection interleaved. A rank
  reads its own experts' part of it, and a column holds gate rows, then up rows. Biases lie in the column, in float32.
  This project's kernels add them and clamp SwiGLU: PyTorch's on the CPU, Triton's on GPUs. NPUs are refused, because
  the grouped product of experts there takes no biases.
- **Sliding windows.** All layers keep keys and values in one pool (SGLang's `--disable-hybrid-swa-memory`, which an
  elastic server sets), and a window is a mask ([ADR 18](adr/0018-one-pool-for-sliding-windows.md)). So a token costs KV
  in every layer for as long as its request runs: {{kv_20b}} for gpt-oss-20b in bfloat16; with a second pool it would be
  half of that, and 128 tokens a request in the other layers. `--swa-full-tokens-ratio` is refused.
- **The CPU platform's attention** knows sinks, and reads only the keys in a window.

`{_REFERENCE_TEST}` compares tokens with those of transformers, through 2 -> 3 -> 1 -> 4 -> 2 and a killed
rank. On GPUs it was not run ([hardware.md](hardware.md)).
"""


def _lines(path: str) -> int:
    return len((_ROOT / path).read_text(encoding="utf-8").splitlines())


def _described(served: Iterable[Architecture]) -> str:
    rows = "".join(
        f"| `{each.name}` | {each.models} | {each.attention} | {each.router} | {each.shared} | `{each.arch}` |\n"
        for each in served
    )
    return (
        f"| Architecture | Models | Attention | Router | Shared experts | `--arch` |\n|---|---|---|---|---|---|\n{rows}"
    )


def cases_of(architecture: Architecture) -> dict[str, str]:
    """Column of the table -> pytest's id."""
    arch = architecture.arch
    return {
        "2 -> 3 -> 1 -> 4 -> 2": f"{_TOKENS}[{arch}-overlap]",
        "workers killed": f"{_KILLS}[{arch}]",
        "bfloat16": f"{_BF16}[{arch}]",
        "elastic KV": f"{_KV}[{_POOLS[architecture.attention]}]",
        "sizes": f"{_SHAPES}[{arch}]",
    }


def _tested(served: Iterable[Architecture]) -> str:
    rows = [(each.arch, cases_of(each)) for each in served]
    columns = list(rows[0][1])
    head = f"| `--arch` | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}\n"
    return head + "".join(
        f"| `{arch}` | {' | '.join(f'`{_short(tests[column])}`' for column in columns)} |\n" for arch, tests in rows
    )


def _short(test: str) -> str:
    path, _, case = test.partition("::")
    return f"{Path(path).name}[{case.partition('[')[2]}"


def _refused() -> str:
    rows = "".join(f"| `{name}` | {reason} |\n" for name, reason in REFUSED.items())
    return f"| Architecture | Why |\n|---|---|\n{rows}"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit status."""
    return write_or_check(
        argv, module="elasticmoe_sglang.models.docs", source="the architectures", make="models-doc", render=render
    )


if __name__ == "__main__":
    sys.exit(main())
