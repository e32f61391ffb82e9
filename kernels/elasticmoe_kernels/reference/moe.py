"""The MoE layer on expert slots, written down plainly: the definition that every backend is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def moe_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_slots: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Sum over k of `topk_weights[t, k] * expert(topk_slots[t, k], x[t])`, expert(s, v) = w2[s] @ (silu(gate) * up).

    Args:
        x: [T, H] activations.
        w13: [S, 2I, H]; rows 0..I-1 of a slot are the gate, rows I..2I-1 the up projection.
        w2: [S, H, I].
        topk_slots: [T, K] int; -1 contributes nothing. Slots that no token names are not read.
        topk_weights: [T, K]; not read where the slot is -1.
        compute_dtype: everything is computed in it, one expert at a time.

    Returns: [T, H] in `compute_dtype`, so that a caller can compare before any rounding.
    """
    tokens, hidden = x.shape
    inter = w2.shape[2]
    out = torch.zeros(tokens, hidden, dtype=compute_dtype, device=x.device)
    for slot in sorted(set(topk_slots.flatten().tolist())):
        if slot < 0:
            continue
        token, k = (topk_slots == slot).nonzero(as_tuple=True)
        gate_up = x[token].to(compute_dtype) @ w13[slot].to(compute_dtype).T
        activated = F.silu(gate_up[:, :inter]) * gate_up[:, inter:]
        y = activated @ w2[slot].to(compute_dtype).T
        out.index_add_(0, token, y * topk_weights[token, k].to(compute_dtype)[:, None])
    return out


def moe_experts_like_input(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_slots: torch.Tensor, topk_weights: torch.Tensor
) -> torch.Tensor:
    """`moe_experts` with the layer's own signature: computed in float64, rounded once to x's dtype."""
    return moe_experts(x, w13, w2, topk_slots, topk_weights).to(x.dtype)
