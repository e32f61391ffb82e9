"""What a MoE model weighs, computed from the fields of its config.json (Hugging Face's names)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elasticmoe_sglang.errors import UnsupportedFeature, UserInputError

BF16 = 2.0
FP8_BLOCK = 1.0 + 4 / (128 * 128)
"""One byte, and a float32 scale for every 128 x 128 block."""
BYTES_PER_PARAMETER = {"bfloat16": BF16, "fp8_block128": FP8_BLOCK}

EXPERT_COUNT_FIELDS = {
    "Qwen3MoeForCausalLM": "num_experts",
    "DeepseekV2ForCausalLM": "n_routed_experts",
    "DeepseekV3ForCausalLM": "n_routed_experts",
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes in parameters, bytes where a name says so.

    experts: routed experts of one MoE layer, the number of expert columns.
    moe_layers: layers that have them.
    column_parameters: one expert over all MoE layers.
    dense_parameters: everything else; every rank holds it whole, since attention is data-parallel.
    kv_elements: of one token over all layers.
    """

    architecture: str
    experts: int
    moe_layers: int
    column_parameters: int
    dense_parameters: int
    kv_elements: int

    @property
    def parameters(self) -> int:
        """Of the whole model, as its makers count them."""
        return self.dense_parameters + self.experts * self.column_parameters

    def column_bytes(self, dtype: str) -> int:
        """Of one expert column in `dtype`, a key of BYTES_PER_PARAMETER."""
        return int(self.column_parameters * BYTES_PER_PARAMETER[dtype])

    def dense_bytes(self) -> int:
        """In bfloat16, which is what a block-quantised checkpoint comes to at most."""
        return int(self.dense_parameters * BF16)

    def kv_bytes_per_token(self) -> int:
        """In bfloat16."""
        return int(self.kv_elements * BF16)

    def rank_weight_bytes(self, dtype: str, ep_size: int, *, granularity: int) -> int:
        """Weights of the fullest of `ep_size` ranks: dense part and columns, each rounded up to `granularity`."""
        columns = -(-self.experts // ep_size)
        return _round_up(self.dense_bytes(), granularity) + columns * _round_up(self.column_bytes(dtype), granularity)


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """From the fields of a config.json. Raises UnsupportedFeature for other architectures, UserInputError for gaps."""
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in EXPERT_COUNT_FIELDS:
        raise UnsupportedFeature(
            f"the shape of {architecture} is not known", hint=f"Known: {', '.join(EXPERT_COUNT_FIELDS)}."
        )
    try:
        return _shape(architecture, config)
    except KeyError as error:
        raise UserInputError(f"the model's config.json has no {error}") from error


def _shape(architecture: str, c: Mapping[str, Any]) -> ModelShape:
    layers, hidden, inter = c["num_hidden_layers"], c["hidden_size"], c["moe_intermediate_size"]
    experts = c[EXPERT_COUNT_FIELDS[architecture]]
    # The first layers of DeepSeek's models have one ordinary MLP in the experts' place.
    dense_layers = c.get("first_k_dense_replace", 0)
    moe_layers = layers - dense_layers
    attention, kv = _mla(c) if "kv_lora_rank" in c else _grouped_query(c)
    shared = (c.get("n_shared_experts") or 0) * 3 * hidden * inter
    # DeepSeek-V3 corrects the router's choice by one number an expert.
    router = experts * hidden + (experts if c.get("topk_method") == "noaux_tc" else 0)
    norms = 2 * hidden
    embeddings = c["vocab_size"] * hidden * (1 if c.get("tie_word_embeddings") else 2)
    dense = (
        layers * (attention + norms)
        + dense_layers * 3 * hidden * c["intermediate_size"]
        + moe_layers * (shared + router)
        + embeddings
        + hidden
    )
    return ModelShape(
        architecture=architecture,
        experts=experts,
        moe_layers=moe_layers,
        column_parameters=moe_layers * 3 * hidden * inter,
        dense_parameters=dense,
        kv_elements=layers * kv,
    )


def _mla(c: Mapping[str, Any]) -> tuple[int, int]:
    """Parameters of one layer's multi-head latent attention, and cached elements a token."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    latent, rope, nope, value = c["kv_lora_rank"], c["qk_rope_head_dim"], c["qk_nope_head_dim"], c["v_head_dim"]
    query, q_latent = heads * (nope + rope), c.get("q_lora_rank")
    queries = hidden * query if q_latent is None else hidden * q_latent + q_latent + q_latent * query
    keys = hidden * (latent + rope) + latent + latent * heads * (nope + value)
    return queries + keys + heads * value * hidden, latent + rope


def _grouped_query(c: Mapping[str, Any]) -> tuple[int, int]:
    """Parameters of one layer's grouped-query attention with normed queries and keys, and cached elements a token."""
    hidden, heads, groups, size = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    return 2 * hidden * heads * size + 2 * hidden * groups * size + 2 * size, 2 * groups * size


def _round_up(nbytes: int, granularity: int) -> int:
    return -(-nbytes // granularity) * granularity
