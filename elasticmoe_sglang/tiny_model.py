"""A small random MoE with a tokenizer, in the Hugging Face layout: for the demo, the tests and benchmarks.

Nothing is downloaded. The tokenizer is trained on Python's own standard library, so it is the same on every machine
with the same Python; the weights depend on the arguments alone.

The weights are not those of an untrained model as frameworks initialise it, whose greedy output soon repeats a word or
two. Embeddings, attention and experts contribute in like measure, so what comes next depends on all of them and long
outputs do not fall into a loop early; logits are wide, so that the best and the second best token are far apart
compared with rounding (`tests/unit/test_tiny_model.py` measures both). The special tokens' output rows are zero:
generated text ends where the request says, not by chance.
"""

from __future__ import annotations

import json
import math
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file

from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.models import ARCHITECTURES, CORRECTED
from elasticmoe_sglang.models.base import CONTEXT, HEAD_DIM, MLP_GAIN, Architecture
from elasticmoe_sglang.models.quantization import BLOCK, BLOCK_FP8

Arch = Literal["qwen3_moe", "deepseek_v2", "deepseek_v3", "qwen2_moe", "glm4_moe", "gpt_oss"]
Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["fp8"]

VOCAB = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_LOGIT_STD = 8.0
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TRAINING_FILES = 40
_LARGEST_E4M3 = 448.0


def make_tiny_model(
    out_dir: str | Path,
    *,
    arch: Arch = "qwen3_moe",
    layers: int = 4,
    experts: int = 16,
    hidden: int = 256,
    dtype: Dtype = "float32",
    seed: int = 0,
    skew: float | None = None,
    quantization: Quantization | None = None,
) -> Path:
    """Write config.json, model.safetensors, tokenizer and chat template to `out_dir` (created) and return it.

    Args:
        arch: what each has is in `models`.
        layers: at least 1, and 2 where the first is dense.
        experts: routed experts a layer, at least 2; four of them see a token, with qwen2_moe eight.
        hidden: width, a multiple of 64, and of 256 with `quantization`.
        seed: of the weights.
        skew: how much more often the first experts are chosen, 0 for not at all; where a correction by expert decides
            (`Architecture.corrected`). None: a correction drawn as the other weights.
        quantization: "fp8": the weights of all projections (not router, embeddings, norms) as e4m3 with a float32 scale
            for each block of 128 x 128, made from the same draws. `dtype` is that of the rest. Inner widths that would
            be no whole blocks are others (`Architecture.tiny_fp8`).

    Raises:
        UserInputError: an argument is outside these limits.
    """
    architecture = _validated(arch, layers, experts, hidden, dtype, quantization)
    config = _common_config(layers, hidden, dtype) | architecture.tiny_config(experts, hidden)
    config |= {"architectures": [architecture.name], "model_type": arch}
    if skew is not None:
        if arch not in CORRECTED or skew < 0:
            raise UserInputError(
                f"{arch} cannot be made with a skew of {skew:g}",
                hint=f"Give 0 or more, with one of {', '.join(CORRECTED)}",
            )
        config["tiny_skew"] = skew
    if quantization is not None:
        config |= {**architecture.tiny_fp8, "quantization_config": BLOCK_FP8}
    path = Path(out_dir)
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False})
    _write_tokenizer(path)
    _write_weights(path, config, architecture, dtype, seed)
    return path


def _validated(arch: str, layers: int, experts: int, hidden: int, dtype: str, quantization: str | None) -> Architecture:
    found = {each.arch: each for each in ARCHITECTURES.values()}.get(arch)
    if found is None:
        raise UserInputError(f"unknown architecture {arch!r}", hint=f"It must be one of {', '.join(get_args(Arch))}")
    if dtype not in get_args(Dtype):
        raise UserInputError(f"unknown dtype {dtype!r}", hint=f"It must be one of {', '.join(get_args(Dtype))}")
    if layers < found.fewest_layers:
        raise UserInputError(f"{arch} needs at least {found.fewest_layers} layers, not {layers}")
    if experts < 2:
        raise UserInputError(f"a mixture needs at least 2 experts, not {experts}")
    if hidden < 64 or hidden % 64:
        raise UserInputError(f"hidden must be a positive multiple of 64, not {hidden}")
    if quantization not in (None, *get_args(Quantization)):
        raise UserInputError(f"unknown quantization {quantization!r}", hint="It must be fp8")
    if quantization is not None and not found.fp8:
        raise UserInputError(
            f"{arch} cannot be made with quantization {quantization}", hint="Its experts are served unquantised only"
        )
    if quantization is not None and hidden % (2 * BLOCK):
        raise UserInputError(
            f"hidden must be a multiple of {2 * BLOCK} with quantization {quantization}, not {hidden}",
            hint=f"Experts, keys and values are half as wide, and a projection is made of blocks of {BLOCK} x {BLOCK}",
        )
    return found


def _common_config(layers: int, hidden: int, dtype: str) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": hidden // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "torch_dtype": dtype,
    }


class _Weights:
    """Draws weights in a fixed order from one generator, float32, and keeps them in the dtype of the checkpoint, or
    those of projections as e4m3 and scales if `blocks`."""

    def __init__(self, dtype: str, seed: int, *, blocks: bool) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._blocks = blocks
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        """[rows, columns] such that unit-variance input gives outputs of standard deviation `gain`."""
        values = torch.randn(rows, columns, generator=self._generator) * (gain / math.sqrt(columns))
        if self._blocks and "_proj" in name.split(".")[-2]:
            self.tensors[name], self.tensors[f"{name}_scale_inv"] = _quantize(values.to(self._dtype).float())
        else:
            self.tensors[name] = values.to(self._dtype)

    def vector(self, name: str, size: int, std: float) -> None:
        """float32 in every checkpoint."""
        self.tensors[name] = torch.randn(size, generator=self._generator) * std

    def values(self, name: str, values: Sequence[float]) -> None:
        """float32 in every checkpoint."""
        self.tensors[name] = torch.tensor(values, dtype=torch.float32)

    def ones(self, name: str, size: int) -> None:
        self.tensors[name] = torch.ones(size, dtype=self._dtype)

    def swiglu(self, prefix: str, hidden: int, inner: int, gain: float) -> None:
        self.matrix(f"{prefix}.gate_proj.weight", inner, hidden)
        self.matrix(f"{prefix}.up_proj.weight", inner, hidden)
        self.matrix(f"{prefix}.down_proj.weight", hidden, inner, gain)

    def stacked(self, name: str, experts: int, inputs: int, outputs: int, gain: float = 1.0) -> None:
        """[experts, inputs, outputs], each expert's as `matrix`, transposed."""
        values = torch.randn(experts, inputs, outputs, generator=self._generator) * (gain / math.sqrt(inputs))
        self.tensors[name] = values.to(self._dtype)

    def biases(self, name: str, shape: Sequence[int], std: float) -> None:
        """Values that bfloat16 has, in the dtype of the checkpoint."""
        values = torch.randn(*shape, generator=self._generator) * std
        self.tensors[name] = values.to(torch.bfloat16).to(self._dtype)


def _quantize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, K] -> (e4m3 [N, K], float32 [ceil(N / 128), ceil(K / 128)]), whose product is about `values`."""
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / _LARGEST_E4M3
    scaled = (blocks / scale[:, None, :, None]).view(padded.shape)
    return scaled[:rows, :columns].to(torch.float8_e4m3fn).contiguous(), scale


def _write_weights(path: Path, config: dict[str, Any], architecture: Architecture, dtype: str, seed: int) -> None:
    weights = _Weights(dtype, seed, blocks="quantization_config" in config)
    hidden = config["hidden_size"]
    weights.matrix("model.embed_tokens.weight", VOCAB, hidden, gain=math.sqrt(hidden))
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        weights.ones(f"{layer}.input_layernorm.weight", hidden)
        weights.ones(f"{layer}.post_attention_layernorm.weight", hidden)
        architecture.tiny_attention(weights, f"{layer}.self_attn", config)
        if index < architecture.dense_layers(config):
            weights.swiglu(f"{layer}.mlp", hidden, config["intermediate_size"], MLP_GAIN)
        else:
            architecture.tiny_experts(weights, f"{layer}.mlp", config, architecture.experts(config))
            architecture.tiny_block(weights, f"{layer}.mlp", config)
    weights.ones("model.norm.weight", hidden)
    weights.matrix("lm_head.weight", VOCAB, hidden, gain=_LOGIT_STD)
    weights.tensors["lm_head.weight"][: len(SPECIAL_TOKENS)] = 0
    save_file(weights.tensors, path / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_text(), trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    end, *others = SPECIAL_TOKENS
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": end,
            "pad_token": end,
            "additional_special_tokens": others,
            "model_max_length": CONTEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    )


def _training_text() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for source in sorted(library.glob("*.py"))[:_TRAINING_FILES]:
        yield source.read_text(encoding="utf-8", errors="replace")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
