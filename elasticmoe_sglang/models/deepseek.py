"""DeepSeek-V2 and V3, which is also R1's and Kimi K2's: latent attention, shared experts, dense first layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elasticmoe_sglang.models.base import (
    ATTENTION_GAIN,
    CONTEXT,
    HEAD_DIM,
    Architecture,
    Config,
    Weights,
    block_with_shared_experts,
    draw_block_with_shared_experts,
)


def _attention_parameters(c: Config) -> int:
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    latent, rope, nope, value = c["kv_lora_rank"], c["qk_rope_head_dim"], c["qk_nope_head_dim"], c["v_head_dim"]
    query, q_latent = heads * (nope + rope), c.get("q_lora_rank")
    queries = hidden * query if q_latent is None else hidden * q_latent + q_latent + q_latent * query
    keys = hidden * (latent + rope) + latent + latent * heads * (nope + value)
    return int(queries + keys + heads * value * hidden)


def _corrected(c: Config) -> bool:
    """Whether the router's choice is corrected by one number an expert."""
    return bool(c.get("topk_method") == "noaux_tc")


def _block_parameters(c: Config) -> int:
    return block_with_shared_experts(c, corrected=_corrected(c))


def _tiny_v2(experts: int, hidden: int) -> dict[str, Any]:
    return {
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


def _tiny_v3(experts: int, hidden: int) -> dict[str, Any]:
    groups = 4 if experts % 4 == 0 and experts >= 16 else 1
    return _tiny_v2(experts, hidden) | {
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": groups,
        "topk_group": max(1, groups // 2),
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 96,
        "num_nextn_predict_layers": 0,
    }


def _tiny_attention(weights: Weights, prefix: str, c: Config) -> None:
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    if c["q_lora_rank"] is None:
        weights.matrix(f"{prefix}.q_proj.weight", heads * (nope + rope), hidden)
    else:
        weights.matrix(f"{prefix}.q_a_proj.weight", c["q_lora_rank"], hidden)
        weights.ones(f"{prefix}.q_a_layernorm.weight", c["q_lora_rank"])
        weights.matrix(f"{prefix}.q_b_proj.weight", heads * (nope + rope), c["q_lora_rank"])
    weights.matrix(f"{prefix}.kv_a_proj_with_mqa.weight", latent + rope, hidden)
    weights.ones(f"{prefix}.kv_a_layernorm.weight", latent)
    weights.matrix(f"{prefix}.kv_b_proj.weight", heads * (nope + value), latent)
    weights.matrix(f"{prefix}.o_proj.weight", hidden, heads * value, gain=ATTENTION_GAIN)


def _tiny_block(weights: Weights, prefix: str, c: Config) -> None:
    draw_block_with_shared_experts(weights, prefix, c, corrected=_corrected(c))


DEEPSEEK_V2 = Architecture(
    name="DeepseekV2ForCausalLM",
    arch="deepseek_v2",
    models="DeepSeek-V2, V2-Lite, V2.5",
    experts_field="n_routed_experts",
    attention="latent (MLA)",
    router="softmax, top k of the best groups",
    shared="whole on every rank, which adds all rows after the sum",
    dense_layers=lambda c: int(c.get("first_k_dense_replace", 0)),
    attention_parameters=_attention_parameters,
    kv_elements=lambda c: int(c["kv_lora_rank"] + c["qk_rope_head_dim"]),
    block_parameters=_block_parameters,
    tiny_config=_tiny_v2,
    tiny_attention=_tiny_attention,
    tiny_block=_tiny_block,
    fewest_layers=2,
    tiny_fp8={"kv_lora_rank": 128},
)
DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    name="DeepseekV3ForCausalLM",
    arch="deepseek_v3",
    models="DeepSeek-V3, R1, Kimi K2",
    router="sigmoid with a correction by expert, top k of the best groups",
    tiny_config=_tiny_v3,
    corrected=True,
    tiny_fp8={"kv_lora_rank": 128, "q_lora_rank": 128},
)
