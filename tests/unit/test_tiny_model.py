"""The tiny model: deterministic, complete, and with greedy tokens that rounding does not change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from elasticmoe_kernels.reference.quantize import dequantize_weight
from elasticmoe_patches.platform import torchvision_ops
from elasticmoe_sglang.cli import tiny_model
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.models import ARCHITECTURES
from elasticmoe_sglang.tiny_model import SPECIAL_TOKENS, VOCAB, Arch, Dtype, _write_weights, make_tiny_model

ARCHS: tuple[Arch, ...] = get_args(Arch)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def small(folder: Path, arch: Arch, **changes: object) -> Path:
    return make_tiny_model(folder, arch=arch, **{"layers": 2, "experts": 6, "hidden": 64, **changes})  # type: ignore[arg-type]


@pytest.mark.process
def test_the_command_offers_all() -> None:
    assert tiny_model.ARCHS == ARCHS


@pytest.mark.process
@pytest.mark.parametrize("arch", ARCHS)
def test_same_arguments_same_files(arch: Arch, tmp_path: Path) -> None:
    first, second = small(tmp_path / "a", arch), small(tmp_path / "b", arch)
    assert digests(first) == digests(second)
    other = digests(small(tmp_path / "c", arch, seed=1))
    assert other.pop("model.safetensors") != digests(first)["model.safetensors"]
    assert other.items() <= digests(first).items(), "the seed is that of the weights alone"


@pytest.mark.process
@pytest.mark.parametrize("arch", ARCHS)
def test_sizes_are_those_asked_for(arch: Arch, tmp_path: Path) -> None:
    folder = small(tmp_path, arch, layers=3, dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    corrections = {name for name in tensors if name.endswith("e_score_correction_bias")}
    sparse = 3 if arch.startswith("qwen") or arch == "gpt_oss" else 2
    assert len(corrections) == (2 if arch in ("deepseek_v3", "glm4_moe") else 0)
    vectors = {name for name in tensors if name in corrections or name.endswith("_proj.bias")}
    assert {tensor.dtype for name, tensor in tensors.items() if name not in vectors} == {torch.bfloat16}
    gates = [name for name in tensors if name.endswith(("mlp.gate.weight", "mlp.router.weight"))]
    assert len(gates) == sparse, "the first layer of DeepSeek's and of GLM's is dense"
    assert all(tensors[name].shape == (6, 64) for name in gates)
    shared = {"qwen3_moe": 0, "qwen2_moe": 3, "gpt_oss": 0}.get(arch, 2)
    assert sum(".mlp.shared_expert" in name and name.endswith(".up_proj.weight") for name in tensors) == shared
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3


@pytest.mark.process
@pytest.mark.parametrize(
    "changes",
    [
        {"arch": "llama"},
        {"layers": 0},
        {"experts": 1},
        {"hidden": 100},
        {"dtype": "int8"},
        {"skew": 0.5},
        {"quantization": "int4"},
        {"quantization": "fp8", "arch": "gpt_oss"},
        {"hidden": 384, "quantization": "fp8"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_impossible_targets_are_refused(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=str(next(iter(changes.values())))):
        make_tiny_model(tmp_path / "never", **changes)  # type: ignore[arg-type]
    assert not (tmp_path / "never").exists()


@pytest.mark.process
@pytest.mark.parametrize("dtype", get_args(Dtype))
@pytest.mark.parametrize("arch", [each.arch for each in ARCHITECTURES.values() if each.fp8])
def test_blocks_come_from_the_same_draws(arch: Arch, dtype: Dtype, tmp_path: Path) -> None:
    """Every projection is within half a step of e4m3 of what is drawn without quantisation; nothing else differs."""
    folder = small(tmp_path / "blocks", arch, hidden=256, dtype=dtype, quantization="fp8")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["weight_block_size"] == [128, 128]
    architecture = next(each for each in ARCHITECTURES.values() if each.arch == arch)
    (tmp_path / "plain").mkdir()
    _write_weights(tmp_path / "plain", config, architecture, dtype, seed=0)
    drawn = load_file(tmp_path / "plain" / "model.safetensors")
    written = load_file(folder / "model.safetensors")
    scales = {name: written.pop(name) for name in list(written) if name.endswith("_scale_inv")}
    assert written.keys() == drawn.keys()
    projections = {name for name in drawn if "_proj" in name and name.endswith(".weight")}
    assert {name.removesuffix("_scale_inv") for name in scales} == projections
    assert all(torch.equal(written[name], drawn[name]) for name in drawn.keys() - projections)
    for name in projections:
        q, scale, wanted = written[name], scales[f"{name}_scale_inv"], drawn[name].double()
        assert (q.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        assert scale.shape == tuple(-(-size // 128) for size in q.shape)
        # Three bits behind the point; below 2**-6, e4m3's steps are equal.
        step = torch.maximum(2.0**-3 * wanted.abs(), 2.0**-9 * dequantize_weight(torch.ones_like(q), scale))
        assert ((dequantize_weight(q, scale) - wanted).abs() <= 0.5001 * step).all(), name


@pytest.mark.process
def test_tokenizer_speaks(tmp_path: Path) -> None:
    torchvision_ops.declare_if_unloadable()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small(tmp_path, "qwen3_moe"))
    text = "def greet(name):\n    return f'Grüße, {name}'  # ✓"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < VOCAB and len(ids) < len(text)
    chat = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2]


@pytest.mark.process  # computes for seconds
@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_decoding_is_well_conditioned(arch: Arch, tmp_path: Path) -> None:
    """Default sizes: over 1024 greedy tokens, the best token leads by far more than float32 rounding moves logits.

    Rounding is what float32 differs by from float64. Single positions may differ by more, where rounding tips the
    choice of an expert; such a tip must not change the token either.
    """
    torchvision_ops.declare_if_unloadable()
    from transformers import AutoModelForCausalLM

    folder = make_tiny_model(tmp_path, arch=arch)
    single, double = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()
        for dtype in (torch.float32, torch.float64)
    )
    prompts = torch.randint(len(SPECIAL_TOKENS), VOCAB, (8, 16), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        length = {"max_new_tokens": 128, "min_new_tokens": 128}
        ids = single.generate(prompts, do_sample=False, eos_token_id=None, pad_token_id=0, **length)
        logits32, logits64 = single(ids).logits[:, 15:-1], double(ids).logits[:, 15:-1]
    best = logits64.topk(2).values
    lead = (best[..., 0] - best[..., 1]).flatten()
    rounding = (logits32 - logits64).abs().amax(-1).flatten()
    print(f"{arch}: smallest lead {lead.min():.1e}, rounding median {rounding.median():.1e} max {rounding.max():.1e}")
    assert lead.min() > 1e-4 and lead.min() > 5 * rounding.median()
    assert torch.equal(logits32.argmax(-1), logits64.argmax(-1))
    generated = ids[:, 16:]
    assert min(len(set(row.tolist())) for row in generated) > 40, "no output is a loop over a few tokens"
    assert not (generated < len(SPECIAL_TOKENS)).any()
