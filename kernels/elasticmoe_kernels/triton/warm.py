"""Loading every kernel that the MoE layer can need, before the first batch needs it.

Which kernels a batch takes follows from its number of tokens: the plan, and the powers of two by which the routing is
compiled. `token_counts` lists one number for each kind of batch, and `load_moe` runs the layer for each with pairs
that name no expert, so that no weight is read.
"""

from __future__ import annotations

from typing import Any

import torch

from elasticmoe_kernels.triton.config import plan_for
from elasticmoe_kernels.triton.launch import next_power_of_2
from elasticmoe_kernels.triton.moe import fused_moe
from elasticmoe_kernels.triton.route import chunks_of

_FINE = 64
_STEPS_AN_OCTAVE = 8


def token_counts(most: int, *, top_k: int, experts: int, hidden: int, inter: int, dtype: torch.dtype) -> list[int]:
    """Numbers of tokens, ascending up to `most`, of which each takes other kernels than the one before."""
    found: list[int] = []
    last: Any = None
    for tokens in _candidates(most, top_k):
        key = _kernels_of(tokens, top_k, experts, hidden, inter, dtype)
        if key != last:
            found.append(tokens)
            last = key
    return found


def _candidates(most: int, top_k: int) -> list[int]:
    """All small numbers, then some in every octave, and both sides of a power of two of pairs."""
    octaves = range(most.bit_length() + 1)
    coarse = {round(2 ** (octave + step / _STEPS_AN_OCTAVE)) for octave in octaves for step in range(_STEPS_AN_OCTAVE)}
    edges = {(1 << octave) // top_k + side for octave in range((most * top_k).bit_length()) for side in (0, 1)}
    return sorted(tokens for tokens in {*range(1, _FINE), *coarse, *edges, most} if 1 <= tokens <= most)


def _kernels_of(tokens: int, top_k: int, experts: int, hidden: int, inter: int, dtype: torch.dtype) -> Any:
    """What the kernels of a batch of so many tokens are compiled for."""
    plan = plan_for(tokens, top_k, experts, 1.0, hidden, inter, dtype)
    if plan.direct:
        return plan
    single, chunk, chunks = chunks_of(tokens * top_k)
    return plan, single, chunk, 1 if single else next_power_of_2(chunks)


def load_moe(
    w13: torch.Tensor,
    w2: torch.Tensor,
    *,
    top_k: int,
    most: int,
    dtype: torch.dtype,
    **more: Any,
) -> list[int]:
    """Run the layer for every kind of batch up to `most` tokens.

    Args:
        w13, w2: of one layer, [S, 2I, H], [S, H, I]; no element is read.
        dtype: of the activations.
        more: scales of e4m3 weights, or biases and what clamps: see `fused_moe`; no element is read.

    Returns:
        The numbers of tokens that were run.
    """
    experts, hidden, inter = w2.shape
    counts = token_counts(most, top_k=top_k, experts=experts, hidden=hidden, inter=inter, dtype=w13.dtype)
    for tokens in counts:
        x = torch.zeros(tokens, hidden, dtype=dtype, device=w13.device)
        nowhere = torch.full((tokens, top_k), -1, dtype=torch.int32, device=w13.device)
        weights = torch.zeros(tokens, top_k, device=w13.device)
        fused_moe(x, w13, w2, nowhere, weights, **more)
    return counts
