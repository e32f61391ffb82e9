"""What an architecture of Mixture-of-Experts models must answer before it can be served elastically.

Names of configuration fields and of weights are Hugging Face's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Config = Mapping[str, Any]

Attention = Literal["grouped queries", "grouped queries with sinks, windows in every other layer", "latent (MLA)"]
SharedExperts = Literal["none", "whole on every rank, which adds all rows after the sum", "each rank its own rows"]


class Weights(Protocol):
    """Draws the weights of a tiny model (`tiny_model`)."""

    def matrix(self, name: str, rows: int, columns: int, gain: float = 1.0) -> None: ...

    def vector(self, name: str, size: int, std: float) -> None: ...

    def values(self, name: str, values: Sequence[float]) -> None: ...

    def ones(self, name: str, size: int) -> None: ...

    def swiglu(self, prefix: str, hidden: int, inner: int, gain: float) -> None: ...

    def stacked(self, name: str, experts: int, inputs: int, outputs: int, gain: float = 1.0) -> None: ...

    def biases(self, name: str, shape: Sequence[int], std: float) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture. The functions take the fields of a config.json.

    All of them have experts of three projections, and one MLP or one mixture a layer.

    Attributes:
        name: as in `architectures` of a config.json.
        arch: of `elasticmoe tiny-model`, and Hugging Face's `model_type`.
        models: published ones.
        experts_field: counts the routed experts of a layer.
        inner_field: the inner width of one.
        biased: routed experts have biases, which columns hold in float32, and their SwiGLU is clamped; a checkpoint
            has the experts of a layer in one tensor. Else they are plain, `...experts.<number>.{gate,up,down}_proj`.
        fp8: block-quantised checkpoints of it can be served.
        attention: which of the two KV pools it needs: keys and values, or one latent vector and one rotary key. Layers
            with a sliding window keep all keys and values in the one pool.
        router: how experts are chosen; computed by SGLang's model on every rank.
        shared: who computes the shared experts of a token.
        dense_layers: number of layers that have an ordinary MLP in the experts' place.
        attention_parameters: of one layer.
        kv_elements: cached elements of one token in one layer.
        block_parameters: of one mixture beside its routed experts: router, shared experts, gates.
        tiny_config: (experts, hidden) -> fields beside those that all tiny models have.
        tiny_block: (weights, prefix, config) draws what `block_parameters` counts, the router apart.
        tiny_attention: (weights, prefix, config).
        tiny_experts: (weights, prefix, config, experts) draws router and routed experts.
        corrected: the router's choice is corrected by one number an expert (`draw_correction`).
        fewest_layers: of a tiny model.
        tiny_fp8: fields of a tiny model with block-quantised weights that differ, so that every width that SGLang
            fuses or sums over is made of whole blocks.
    """

    name: str
    arch: str
    models: str
    experts_field: str
    attention: Attention
    router: str
    shared: SharedExperts
    attention_parameters: Callable[[Config], int]
    kv_elements: Callable[[Config], int]
    block_parameters: Callable[[Config], int]
    tiny_config: Callable[[int, int], dict[str, Any]]
    tiny_attention: Callable[[Weights, str, Config], None]
    tiny_block: Callable[[Weights, str, Config], None]
    tiny_experts: Callable[[Weights, str, Config, int], None] = lambda weights, prefix, config, experts: draw_experts(
        weights, prefix, config, experts
    )
    inner_field: str = "moe_intermediate_size"
    biased: bool = False
    fp8: bool = True
    dense_layers: Callable[[Config], int] = lambda config: 0
    corrected: bool = False
    fewest_layers: int = 1
    tiny_fp8: Mapping[str, int] = field(default_factory=dict)

    def experts(self, config: Config) -> int:
        """Routed experts of one MoE layer. Raises KeyError if the configuration does not say."""
        return int(config[self.experts_field])

    def bias_parameters(self, config: Config) -> int:
        """Biases of one routed expert of one layer: of its gate, up and down projection."""
        return int(2 * config[self.inner_field] + config["hidden_size"]) if self.biased else 0


HEAD_DIM = 32
CONTEXT = 4096
"""Of tiny models."""

# Averaging over positions and over experts shrinks what a branch adds; the gains undo it, so that every branch of a
# tiny model adds about as much as the residual stream holds.
ATTENTION_GAIN = 3.0
MLP_GAIN = 2.0
EXPERT_GAIN = 4.0
ROUTER_GAIN = 4.0
CORRECTION = 0.1
BIAS = 0.1


def draw_correction(weights: Weights, prefix: str, c: Config) -> None:
    """What is added to each expert's score: noise or, in a tiny model with `tiny_skew`, less from expert to expert, so
    that the first ones are chosen most."""
    experts, skew = c["n_routed_experts"], c.get("tiny_skew")
    name = f"{prefix}.gate.e_score_correction_bias"
    if skew is None:
        weights.vector(name, experts, CORRECTION)
    else:
        weights.values(name, [-skew * math.log(1 + expert) / math.log(experts) for expert in range(experts)])


def draw_experts(weights: Weights, prefix: str, c: Config, experts: int) -> None:
    """Draw a router and routed experts of plain SwiGLU."""
    hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
    weights.matrix(f"{prefix}.gate.weight", experts, hidden, gain=ROUTER_GAIN)
    for expert in range(experts):
        weights.swiglu(f"{prefix}.experts.{expert}", hidden, inner, EXPERT_GAIN)


def swiglu_parameters(hidden: int, inner: int) -> int:
    """Gate, up and down projection."""
    return 3 * hidden * inner


def shared_experts_size(c: Config) -> int:
    """Inner width of all shared experts of a layer together, in DeepSeek's fields; 0 for none."""
    return int((c.get("n_shared_experts") or 0) * c["moe_intermediate_size"])


def block_with_shared_experts(c: Config, *, corrected: bool) -> int:
    """Parameters of router, correction and shared experts, in DeepSeek's fields."""
    shared = swiglu_parameters(c["hidden_size"], shared_experts_size(c))
    return int(c["n_routed_experts"] * (c["hidden_size"] + corrected) + shared)


def draw_block_with_shared_experts(weights: Weights, prefix: str, c: Config, *, corrected: bool) -> None:
    """Draw what that counts, the router apart."""
    if corrected:
        draw_correction(weights, prefix, c)
    weights.swiglu(f"{prefix}.shared_experts", c["hidden_size"], shared_experts_size(c), MLP_GAIN)


def head_dim(c: Config) -> int:
    """Of one head; configurations leave it out where the heads divide the width."""
    return int(c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"])


def grouped_query_parameters(c: Config, *, biases: bool = False, norms: bool = False) -> int:
    """Of one layer, with biases of queries, keys and values, and with norms of queries and keys."""
    hidden, size = c["hidden_size"], head_dim(c)
    heads, groups = c["num_attention_heads"], c["num_key_value_heads"]
    projections = 2 * hidden * heads * size + 2 * hidden * groups * size
    return int(projections + biases * (heads + 2 * groups) * size + norms * 2 * size)


def grouped_query_kv(c: Config) -> int:
    """Keys and values of one token in one layer."""
    return int(2 * c["num_key_value_heads"] * head_dim(c))


def grouped_query_weights(
    weights: Weights, prefix: str, c: Config, *, biases: bool = False, norms: bool = False
) -> None:
    """Draw the attention of one layer of a tiny model."""
    hidden = c["hidden_size"]
    for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
        weights.matrix(f"{prefix}.{name}_proj.weight", c[heads] * HEAD_DIM, hidden)
        if biases:
            weights.vector(f"{prefix}.{name}_proj.bias", c[heads] * HEAD_DIM, BIAS)
    weights.matrix(f"{prefix}.o_proj.weight", hidden, c["num_attention_heads"] * HEAD_DIM, gain=ATTENTION_GAIN)
    if norms:
        weights.ones(f"{prefix}.q_norm.weight", HEAD_DIM)
        weights.ones(f"{prefix}.k_norm.weight", HEAD_DIM)
