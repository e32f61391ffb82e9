"""Qwen3-MoE: grouped-query attention with normed queries and keys, no shared expert."""

from __future__ import annotations

from functools import partial
from typing import Any

from elasticmoe_sglang.models.base import (
    HEAD_DIM,
    Architecture,
    grouped_query_kv,
    grouped_query_parameters,
    grouped_query_weights,
)


def _tiny_config(experts: int, hidden: int) -> dict[str, Any]:
    return {
        "head_dim": HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2,
        "num_experts": experts,
        "num_experts_per_tok": min(4, experts),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    arch="qwen3_moe",
    models="Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    experts_field="num_experts",
    attention="grouped queries",
    router="softmax, top k",
    shared="none",
    attention_parameters=partial(grouped_query_parameters, norms=True),
    kv_elements=grouped_query_kv,
    block_parameters=lambda c: c["num_experts"] * c["hidden_size"],
    tiny_config=_tiny_config,
    tiny_attention=partial(grouped_query_weights, norms=True),
    tiny_block=lambda weights, prefix, c: None,
)
