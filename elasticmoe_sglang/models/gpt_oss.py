"""gpt-oss: biased experts with a clamped SwiGLU, attention with sinks and biases, a window in every other layer."""

from __future__ import annotations

from typing import Any

from elasticmoe_sglang.models.base import (
    ATTENTION_GAIN,
    BIAS,
    EXPERT_GAIN,
    HEAD_DIM,
    ROUTER_GAIN,
    Architecture,
    Config,
    Weights,
    grouped_query_kv,
    grouped_query_parameters,
    head_dim,
)

TINY_WINDOW = 32
_SINK = 1.0
_GATE_UP_GAIN = 3.0
"""So that one value in fifty is clamped."""


def _attention_parameters(c: Config) -> int:
    biases = (c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * head_dim(c) + c["hidden_size"]
    return int(grouped_query_parameters(c) + biases + c["num_attention_heads"])


def _tiny_config(experts: int, hidden: int) -> dict[str, Any]:
    return {
        "head_dim": HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2,
        "num_local_experts": experts,
        "num_experts_per_tok": min(4, experts),
        "intermediate_size": 3 * hidden // 4,
        "attention_bias": True,
        "sliding_window": TINY_WINDOW,
        "swiglu_limit": 7.0,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    }


def _tiny_attention(weights: Weights, prefix: str, c: Config) -> None:
    hidden = c["hidden_size"]
    for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
        weights.matrix(f"{prefix}.{name}_proj.weight", c[heads] * HEAD_DIM, hidden)
        weights.biases(f"{prefix}.{name}_proj.bias", [c[heads] * HEAD_DIM], BIAS)
    weights.matrix(f"{prefix}.o_proj.weight", hidden, c["num_attention_heads"] * HEAD_DIM, gain=ATTENTION_GAIN)
    weights.biases(f"{prefix}.o_proj.bias", [hidden], BIAS)
    weights.biases(f"{prefix}.sinks", [c["num_attention_heads"]], _SINK)


def _tiny_experts(weights: Weights, prefix: str, c: Config, experts: int) -> None:
    """Gate and up projections are interleaved, as in published checkpoints."""
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    weights.matrix(f"{prefix}.router.weight", experts, hidden, gain=ROUTER_GAIN)
    weights.biases(f"{prefix}.router.bias", [experts], BIAS)
    weights.stacked(f"{prefix}.experts.gate_up_proj", experts, hidden, 2 * inner, _GATE_UP_GAIN)
    weights.biases(f"{prefix}.experts.gate_up_proj_bias", [experts, 2 * inner], BIAS)
    weights.stacked(f"{prefix}.experts.down_proj", experts, inner, hidden, EXPERT_GAIN / _GATE_UP_GAIN)
    weights.biases(f"{prefix}.experts.down_proj_bias", [experts, hidden], BIAS)


GPT_OSS = Architecture(
    name="GptOssForCausalLM",
    arch="gpt_oss",
    models="gpt-oss-20b, gpt-oss-120b",
    experts_field="num_local_experts",
    inner_field="intermediate_size",
    biased=True,
    fp8=False,
    attention="grouped queries with sinks, windows in every other layer",
    router="biased, softmax of the top k",
    shared="none",
    attention_parameters=_attention_parameters,
    kv_elements=grouped_query_kv,
    block_parameters=lambda c: c["num_local_experts"] * (c["hidden_size"] + 1),
    tiny_config=_tiny_config,
    tiny_attention=_tiny_attention,
    tiny_experts=_tiny_experts,
    tiny_block=lambda weights, prefix, c: None,
)
