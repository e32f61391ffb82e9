"""What a MoE model weighs, computed from the fields of its config.json (Hugging Face's names)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.models import architecture_of
from elasticmoe_sglang.models.base import Architecture, swiglu_parameters

FP32 = 4.0
BF16 = 2.0
FP8_BLOCK = 1.0 + 4 / (128 * 128)
"""One byte, and a float32 scale for every 128 x 128 block."""
BYTES_PER_PARAMETER = {"bfloat16": BF16, "fp8_block128": FP8_BLOCK}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes in parameters, bytes where a name says so.

    experts: routed experts of one MoE layer, the number of expert columns.
    moe_layers: layers that have them.
    column_parameters: one expert over all MoE layers. column_biases: those of them that are biases, float32 whatever
        the weights' dtype.
    dense_parameters: everything else; every rank holds it whole, since attention is data-parallel.
    kv_elements: of one token over all layers.
    """

    architecture: str
    experts: int
    moe_layers: int
    column_parameters: int
    dense_parameters: int
    kv_elements: int
    column_biases: int = 0

    @property
    def parameters(self) -> int:
        """Of the whole model, as its makers count them."""
        return self.dense_parameters + self.experts * self.column_parameters

    def column_bytes(self, dtype: str) -> int:
        """Of one expert column in `dtype`, a key of BYTES_PER_PARAMETER."""
        weights = self.column_parameters - self.column_biases
        return int(weights * BYTES_PER_PARAMETER[dtype] + self.column_biases * FP32)

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
    architecture = architecture_of(config)
    try:
        return _shape(architecture, config)
    except KeyError as error:
        raise UserInputError(f"the model's config.json has no {error}") from error


def _shape(architecture: Architecture, c: Mapping[str, Any]) -> ModelShape:
    layers, hidden = c["num_hidden_layers"], c["hidden_size"]
    dense_layers = architecture.dense_layers(c)
    moe_layers = layers - dense_layers
    norms = 2 * hidden
    biases = moe_layers * architecture.bias_parameters(c)
    embeddings = c["vocab_size"] * hidden * (1 if c.get("tie_word_embeddings") else 2)
    dense = (
        layers * (architecture.attention_parameters(c) + norms)
        + dense_layers * swiglu_parameters(hidden, c["intermediate_size"])
        + moe_layers * architecture.block_parameters(c)
        + embeddings
        + hidden
    )
    return ModelShape(
        architecture=architecture.name,
        experts=architecture.experts(c),
        moe_layers=moe_layers,
        column_parameters=moe_layers * swiglu_parameters(hidden, c[architecture.inner_field]) + biases,
        column_biases=biases,
        dense_parameters=dense,
        kv_elements=layers * architecture.kv_elements(c),
    )


def _round_up(nbytes: int, granularity: int) -> int:
    return -(-nbytes // granularity) * granularity
