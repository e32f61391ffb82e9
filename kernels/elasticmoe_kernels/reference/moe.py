"""The MoE layer on expert slots, written down plainly: the definition that every backend is measured against."""

from __future__ import annotations

import torch

from elasticmoe_kernels.reference.gemm_down import gemm_down
from elasticmoe_kernels.reference.gemm_swiglu import gemm_clamped_swiglu, gemm_swiglu
from elasticmoe_kernels.reference.quantize import dequantize, dequantize_weight, quantize


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
        w13: [S, 2I, H]; rows 0..I-1 of a slot are the gate projection, rows I..2I-1 the up projection.
        w2: [S, H, I].
        topk_slots: [T, K] int; -1 contributes nothing. Slots that no token names are not read.
        topk_weights: [T, K]; not read where the slot is -1.
        compute_dtype: everything is computed in it, one expert at a time.

    Returns: [T, H] in `compute_dtype`, so that a caller can compare before any rounding.
    """
    tokens, hidden = x.shape
    out = torch.zeros(tokens, hidden, dtype=compute_dtype, device=x.device)
    for slot in _slots_in(topk_slots):
        token, k = (topk_slots == slot).nonzero(as_tuple=True)
        h = gemm_swiglu(x[token].to(compute_dtype), w13[slot].to(compute_dtype))
        y = gemm_down(h, w2[slot].to(compute_dtype))
        out.index_add_(0, token, y * topk_weights[token, k].to(compute_dtype)[:, None])
    return out


def moe_experts_fp8(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_slots: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    quantize_activations: bool = True,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`moe_experts` with e4m3 weights and their 128 x 128 scales: w13_scale [S, 2I/128, H/128], w2_scale
    [S, H/128, I/128].

    quantize_activations: x and h pass through e4m3 by token and group of 128, as the fast kernels have it; False gives
    what the weights alone say.
    """

    def through(a: torch.Tensor) -> torch.Tensor:
        return dequantize(*quantize(a), compute_dtype) if quantize_activations else a.to(compute_dtype)

    out = torch.zeros(x.shape, dtype=compute_dtype, device=x.device)
    x_wide = through(x)
    for slot in _slots_in(topk_slots):
        token, k = (topk_slots == slot).nonzero(as_tuple=True)
        h = gemm_swiglu(x_wide[token], dequantize_weight(w13[slot], w13_scale[slot], compute_dtype))
        y = gemm_down(through(h), dequantize_weight(w2[slot], w2_scale[slot], compute_dtype))
        out.index_add_(0, token, y * topk_weights[token, k].to(compute_dtype)[:, None])
    return out


def moe_experts_biased(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor,
    w2_bias: torch.Tensor,
    topk_slots: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    alpha: float,
    limit: float,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """`moe_experts` with gpt-oss's experts: expert(s, v) = w2[s] @ clamped(w13[s] @ v + w13_bias[s]) + w2_bias[s].

    w13_bias: [S, 2I]; w2_bias: [S, H], added before a pair is weighted. alpha, limit: see `gemm_clamped_swiglu`.
    """
    out = torch.zeros(x.shape, dtype=compute_dtype, device=x.device)
    for slot in _slots_in(topk_slots):
        token, k = (topk_slots == slot).nonzero(as_tuple=True)
        wide = [each[slot].to(compute_dtype) for each in (w13, w13_bias, w2, w2_bias)]
        h = gemm_clamped_swiglu(x[token].to(compute_dtype), wide[0], wide[1], alpha=alpha, limit=limit)
        y = gemm_down(h, wide[2]) + wide[3]
        out.index_add_(0, token, y * topk_weights[token, k].to(compute_dtype)[:, None])
    return out


def _slots_in(topk_slots: torch.Tensor) -> list[int]:
    return sorted(set(topk_slots.flatten().tolist()) - {-1})


def moe_experts_like_input(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_slots: torch.Tensor,
    topk_weights: torch.Tensor,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    clamped: tuple[float, float] | None = None,
) -> torch.Tensor:
    """`moe_experts` with the layer's own signature: computed in float64, rounded once to x's dtype."""
    if w13_bias is None or w2_bias is None or clamped is None:
        return moe_experts(x, w13, w2, topk_slots, topk_weights).to(x.dtype)
    alpha, limit = clamped
    out = moe_experts_biased(x, w13, w2, w13_bias, w2_bias, topk_slots, topk_weights, alpha=alpha, limit=limit)
    return out.to(x.dtype)
