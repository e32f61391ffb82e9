"""The MoE layer on CUDA: two products and a combine for small batches, with a routing launch in front for others."""

from __future__ import annotations

from typing import Any

import torch

from elasticmoe_kernels.errors import ShapeError
from elasticmoe_kernels.triton.combine import combine
from elasticmoe_kernels.triton.config import MoePlan, plan_for
from elasticmoe_kernels.triton.gemm_down import gemm_down_direct, gemm_down_sorted
from elasticmoe_kernels.triton.gemm_swiglu import gemm_swiglu_direct, gemm_swiglu_sorted
from elasticmoe_kernels.triton.launch import supports_pdl
from elasticmoe_kernels.triton.quantize import quantize
from elasticmoe_kernels.triton.route import route

FP8 = torch.float8_e4m3fn


def fused_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    slot_table: torch.Tensor | None = None,
    mapped_slots: int | None = None,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    clamped: tuple[float, float] | None = None,
    out: torch.Tensor | None = None,
    plan: MoePlan | None = None,
) -> torch.Tensor:
    """See `registry.moe_experts`: the layer with everything it can take.

    Args:
        x: [T, H] bfloat16 or float16.
        w13, w2: [S, 2I, H], [S, H, I], any pitch in dim 0 (a multiple of 16 bytes), in x's dtype or float8_e4m3fn.
            A slot that no pair names is never loaded.
        topk_ids: [T, K] int32 or int64 expert ids, contiguous; -1 adds nothing.
        topk_weights: [T, K] float32, contiguous.
        slot_table: int32 [experts]: slot of each expert on this rank, -1 = not here. None: the ids are slots.
        mapped_slots: how many slots hold an expert, if fewer than S (bounds the grid and the scratch).
        w13_scale, w2_scale: float32 [S, 2I/128, H/128], [S, H/128, I/128], needed with e4m3 weights; x and h are then
            quantized by token and group of 128 columns. H and I must be multiples of 128.
        w13_bias, w2_bias, clamped: of biased experts, all or none: see `registry.moe_experts`.
        out: [T, H] to write to; every element is written.
        plan: overrides the tuned configuration.

    Makes no host synchronisation: safe in a CUDA graph. Raises ShapeError.
    """
    tokens, hidden = x.shape
    top_k, inter, slots = topk_ids.shape[1], w2.shape[2], w2.shape[0]
    if out is None:
        out = torch.empty_like(x)
    if tokens == 0:
        return out
    _check(x, w13, w2, topk_ids, topk_weights, w13_scale, w2_scale)
    here = slots if mapped_slots is None else min(mapped_slots, slots)
    if plan is None:
        share = here / max(slots if slot_table is None else slot_table.shape[0], here)
        plan = plan_for(tokens, top_k, here, share, hidden, inter, w13.dtype)
    pdl = supports_pdl(x.device)
    first: dict[str, Any] = {} if clamped is None else {"bias": w13_bias, "clamped": clamped}
    x_in, x_scale = quantize(x, pdl=pdl) if plan.quantize_first else (x, None)
    if plan.direct:
        h, h_scale, y = _scratch(x, tokens * top_k, inter, quantized=plan.quantize_h)
        gemm_swiglu_direct(x_in, x_scale, w13, w13_scale, topk_ids, slot_table, h, h_scale, plan.w13, pdl=pdl, **first)
        gemm_down_direct(h, h_scale, w2, w2_scale, topk_ids, slot_table, y, plan.w2, bias=w2_bias, pdl=pdl)
        combine(y, topk_ids, slot_table, topk_weights, out, direct=True, pdl=pdl)
        return out
    routing = route(topk_ids, slot_table, num_slots=slots, mapped_slots=here, block_m=plan.w13.block_m, pdl=pdl)
    rows = routing.capacity_blocks * routing.block_m
    h, h_scale, y = _scratch(x, rows, inter, quantized=plan.quantize_h)
    gemm_swiglu_sorted(x_in, x_scale, w13, w13_scale, routing, top_k, h, h_scale, plan.w13, pdl=pdl, **first)
    gemm_down_sorted(h, h_scale, w2, w2_scale, routing, y, plan.w2, bias=w2_bias, pdl=pdl)
    combine(y, routing.row_of_pair, None, topk_weights, out, direct=False, pdl=pdl)
    return out


def _scratch(
    x: torch.Tensor, rows: int, inter: int, *, quantized: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """h [rows, I], its scales if quantized, y [rows, H]."""
    h = x.new_empty(rows, inter, dtype=FP8 if quantized else x.dtype)
    h_scale = x.new_empty(rows, inter // 128, dtype=torch.float32) if quantized else None
    return h, h_scale, x.new_empty(rows, x.shape[1])


def _check(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor,
    w13_scale: torch.Tensor | None, w2_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    if not (topk_ids.is_contiguous() and topk_weights.is_contiguous() and x.stride(1) == 1):
        raise ShapeError("topk_ids and topk_weights must be contiguous, and x within its rows")
    fp8 = w13.dtype == FP8
    if fp8 != (w13_scale is not None and w2_scale is not None):
        raise ShapeError(f"weights are {w13.dtype}: scales must be given with float8_e4m3fn, and only then")
    if fp8 and (x.shape[1] % 128 or w2.shape[2] % 128):
        raise ShapeError(f"fp8 needs H and I in multiples of 128; got {x.shape[1]} and {w2.shape[2]}")
    if w13.data_ptr() % 16 or w2.data_ptr() % 16:
        raise ShapeError("w13 and w2 must start at multiples of 16 bytes")
    if not fp8 and x.dtype != w13.dtype:
        raise ShapeError(f"x is {x.dtype} and the weights are {w13.dtype}")
