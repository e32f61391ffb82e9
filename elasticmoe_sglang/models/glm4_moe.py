"""GLM-4.5's architecture: half-rotary grouped-query attention, corrected sigmoid router, a shared expert."""

from __future__ import annotations

from functools import partial
from typing import Any

from elasticmoe_sglang.models.base import (
    HEAD_DIM,
    Architecture,
    Config,
    block_with_shared_experts,
    draw_block_with_shared_experts,
    grouped_query_kv,
    grouped_query_parameters,
    grouped_query_weights,
)


def _attention_parameters(c: Config) -> int:
    return grouped_query_parameters(c, biases=bool(c.get("attention_bias")), norms=bool(c.get("use_qk_norm")))


def _tiny_config(experts: int, hidden: int) -> dict[str, Any]:
    return {
        "head_dim": HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": min(4, experts),
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
    }


GLM4_MOE = Architecture(
    name="Glm4MoeForCausalLM",
    arch="glm4_moe",
    models="GLM-4.5, GLM-4.5-Air, GLM-4.6",
    experts_field="n_routed_experts",
    attention="grouped queries",
    router="sigmoid with a correction by expert, top k",
    shared="each rank its own rows",
    dense_layers=lambda c: int(c["first_k_dense_replace"]),
    attention_parameters=_attention_parameters,
    kv_elements=grouped_query_kv,
    block_parameters=partial(block_with_shared_experts, corrected=True),
    tiny_config=_tiny_config,
    tiny_attention=partial(grouped_query_weights, biases=True, norms=True),
    tiny_block=partial(draw_block_with_shared_experts, corrected=True),
    corrected=True,
    fewest_layers=2,
)
