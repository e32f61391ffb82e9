"""Qwen2-MoE: biased queries, keys and values, and one shared expert that a gate of its own weighs."""

from __future__ import annotations

from functools import partial
from typing import Any

from elasticmoe_sglang.models.base import (
    HEAD_DIM,
    MLP_GAIN,
    Architecture,
    Config,
    Weights,
    grouped_query_kv,
    grouped_query_parameters,
    grouped_query_weights,
    swiglu_parameters,
)


def _block_parameters(c: Config) -> int:
    hidden = c["hidden_size"]
    shared = swiglu_parameters(hidden, c["shared_expert_intermediate_size"])
    return int(c["num_experts"] * hidden + shared + hidden)


def _tiny_config(experts: int, hidden: int) -> dict[str, Any]:
    return {
        "num_key_value_heads": hidden // HEAD_DIM // 2,
        "num_experts": experts,
        # The weights are not divided by their sum. With so many the last one is small: where rounding decides which
        # expert that is, the tokens are the same.
        "num_experts_per_tok": min(8, experts),
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": hidden,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
    }


def _tiny_block(weights: Weights, prefix: str, c: Config) -> None:
    hidden = c["hidden_size"]
    weights.swiglu(f"{prefix}.shared_expert", hidden, c["shared_expert_intermediate_size"], MLP_GAIN)
    weights.matrix(f"{prefix}.shared_expert_gate.weight", 1, hidden)


QWEN2_MOE = Architecture(
    name="Qwen2MoeForCausalLM",
    arch="qwen2_moe",
    models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    experts_field="num_experts",
    attention="grouped queries",
    router="softmax, top k, weights as they are",
    shared="each rank its own rows",
    attention_parameters=partial(grouped_query_parameters, biases=True),
    kv_elements=grouped_query_kv,
    block_parameters=_block_parameters,
    tiny_config=_tiny_config,
    tiny_attention=partial(grouped_query_weights, biases=True),
    tiny_block=_tiny_block,
)
