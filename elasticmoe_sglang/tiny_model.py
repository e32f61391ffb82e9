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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file

from elasticmoe_sglang.errors import UserInputError

Arch = Literal["qwen3_moe", "deepseek_v2"]
Dtype = Literal["float32", "bfloat16"]

VOCAB = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONTEXT = 4096
HEAD_DIM = 32

_LOGIT_STD = 8.0
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TRAINING_FILES = 40


def make_tiny_model(
    out_dir: str | Path,
    *,
    arch: Arch = "qwen3_moe",
    layers: int = 4,
    experts: int = 16,
    hidden: int = 256,
    dtype: Dtype = "float32",
    seed: int = 0,
) -> Path:
    """Write config.json, model.safetensors, tokenizer and chat template to `out_dir` (created) and return it.

    Args:
        arch: "deepseek_v2" has MLA, one shared expert and a dense first layer; "qwen3_moe" has grouped-query attention.
        layers: at least 1, for deepseek_v2 at least 2 (the first is dense).
        experts: routed experts a layer, at least 2; up to 4 of them see a token.
        hidden: width, a multiple of 64.
        seed: of the weights.

    Raises:
        UserInputError: an argument is outside these limits.
    """
    _validate(arch, layers, experts, hidden, dtype)
    path = Path(out_dir)
    path.mkdir(parents=True, exist_ok=True)
    architecture = _qwen3_moe_config if arch == "qwen3_moe" else _deepseek_config
    config = architecture(experts, hidden) | _common_config(layers, hidden, dtype)
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0, "do_sample": False})
    _write_tokenizer(path)
    _write_weights(path, config, arch, dtype, seed)
    return path


def _validate(arch: str, layers: int, experts: int, hidden: int, dtype: str) -> None:
    if arch not in get_args(Arch):
        raise UserInputError(f"unknown architecture {arch!r}", hint=f"It must be one of {', '.join(get_args(Arch))}")
    if dtype not in get_args(Dtype):
        raise UserInputError(f"unknown dtype {dtype!r}", hint=f"It must be one of {', '.join(get_args(Dtype))}")
    fewest = 2 if arch == "deepseek_v2" else 1
    if layers < fewest:
        raise UserInputError(f"{arch} needs at least {fewest} layers, not {layers}")
    if experts < 2:
        raise UserInputError(f"a mixture needs at least 2 experts, not {experts}")
    if hidden < 64 or hidden % 64:
        raise UserInputError(f"hidden must be a positive multiple of 64, not {hidden}")


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


def _qwen3_moe_config(experts: int, hidden: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2,
        "num_experts": experts,
        "num_experts_per_tok": min(4, experts),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _deepseek_config(experts: int, hidden: int) -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_key_value_heads": hidden // HEAD_DIM,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(4, experts),
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": HEAD_DIM,
        "qk_rope_head_dim": HEAD_DIM,
        "v_head_dim": HEAD_DIM,
        # SGLang's rotary factory for this architecture wants YaRN. With mscale_all_dim 0 the softmax scale stays as it
        # is and only the rotary part is scaled, on which SGLang and transformers agree.
        "rope_scaling": {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": CONTEXT // 4,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
        },
    }


class _Weights:
    """Draws weights in a fixed order from one generator, float32, and keeps them in the dtype of the checkpoint."""

    def __init__(self, dtype: str, seed: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        """[rows, columns] such that unit-variance input gives outputs of standard deviation `gain`."""
        values = torch.randn(rows, columns, generator=self._generator) * (gain / math.sqrt(columns))
        self.tensors[name] = values.to(self._dtype)

    def ones(self, name: str, size: int) -> None:
        self.tensors[name] = torch.ones(size, dtype=self._dtype)

    def swiglu(self, prefix: str, hidden: int, inner: int, gain: float) -> None:
        self.matrix(f"{prefix}.gate_proj.weight", inner, hidden)
        self.matrix(f"{prefix}.up_proj.weight", inner, hidden)
        self.matrix(f"{prefix}.down_proj.weight", hidden, inner, gain)


def _write_weights(path: Path, config: dict[str, Any], arch: str, dtype: str, seed: int) -> None:
    weights = _Weights(dtype, seed)
    hidden = config["hidden_size"]
    weights.matrix("model.embed_tokens.weight", VOCAB, hidden, gain=math.sqrt(hidden))
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        weights.ones(f"{layer}.input_layernorm.weight", hidden)
        weights.ones(f"{layer}.post_attention_layernorm.weight", hidden)
        if arch == "qwen3_moe":
            _qwen3_moe_layer(weights, layer, config)
        else:
            _deepseek_layer(weights, layer, config, dense=index < config["first_k_dense_replace"])
    weights.ones("model.norm.weight", hidden)
    weights.matrix("lm_head.weight", VOCAB, hidden, gain=_LOGIT_STD)
    weights.tensors["lm_head.weight"][: len(SPECIAL_TOKENS)] = 0
    save_file(weights.tensors, path / "model.safetensors", metadata={"format": "pt"})


def _qwen3_moe_layer(weights: _Weights, layer: str, config: dict[str, Any]) -> None:
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    attention = f"{layer}.self_attn"
    weights.matrix(f"{attention}.q_proj.weight", heads * HEAD_DIM, hidden)
    weights.matrix(f"{attention}.k_proj.weight", kv_heads * HEAD_DIM, hidden)
    weights.matrix(f"{attention}.v_proj.weight", kv_heads * HEAD_DIM, hidden)
    weights.matrix(f"{attention}.o_proj.weight", hidden, heads * HEAD_DIM, gain=_ATTENTION_GAIN)
    weights.ones(f"{attention}.q_norm.weight", HEAD_DIM)
    weights.ones(f"{attention}.k_norm.weight", HEAD_DIM)
    _experts(weights, f"{layer}.mlp", config, config["num_experts"])


def _deepseek_layer(weights: _Weights, layer: str, config: dict[str, Any], *, dense: bool) -> None:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent = config["kv_lora_rank"]
    attention = f"{layer}.self_attn"
    weights.matrix(f"{attention}.q_proj.weight", heads * (nope + rope), hidden)
    weights.matrix(f"{attention}.kv_a_proj_with_mqa.weight", latent + rope, hidden)
    weights.ones(f"{attention}.kv_a_layernorm.weight", latent)
    weights.matrix(f"{attention}.kv_b_proj.weight", heads * (nope + value), latent)
    weights.matrix(f"{attention}.o_proj.weight", hidden, heads * value, gain=_ATTENTION_GAIN)
    if dense:
        weights.swiglu(f"{layer}.mlp", hidden, config["intermediate_size"], _MLP_GAIN)
        return
    _experts(weights, f"{layer}.mlp", config, config["n_routed_experts"])
    shared = config["n_shared_experts"] * config["moe_intermediate_size"]
    weights.swiglu(f"{layer}.mlp.shared_experts", hidden, shared, _MLP_GAIN)


def _experts(weights: _Weights, prefix: str, config: dict[str, Any], experts: int) -> None:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    weights.matrix(f"{prefix}.gate.weight", experts, hidden, gain=_ROUTER_GAIN)
    for expert in range(experts):
        weights.swiglu(f"{prefix}.experts.{expert}", hidden, inner, _EXPERT_GAIN)


# Averaging over positions and over experts shrinks what a branch adds; the gains undo it, so that every branch adds
# about as much as the residual stream holds.
_ATTENTION_GAIN = 3.0
_MLP_GAIN = 2.0
_EXPERT_GAIN = 4.0
_ROUTER_GAIN = 4.0


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
