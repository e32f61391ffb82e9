# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"
"""Weighted combine: out[t] = sum over k of weight[t, k] * y[row of (t, k)], in float32, in the order of k."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elasticmoe_kernels.triton.launch import next_power_of_2, pdl_options
from elasticmoe_kernels.triton.route import slots_of


@triton.jit
def _combine_kernel(y_ptr, rows_ptr, table_ptr, weights_ptr, out_ptr, hidden, y_stride, out_stride, K: tl.constexpr,
                    DIRECT: tl.constexpr, HAS_TABLE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < hidden
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        if DIRECT:
            here = slots_of(rows_ptr, table_ptr, pair, True, HAS_TABLE) >= 0
            row = pair
        else:
            row = tl.load(rows_ptr + pair).to(tl.int64)
            here = row >= 0
        # Loads of absent pairs are masked, their weight too: it may be anything.
        weight = tl.load(weights_ptr + pair, mask=here, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_stride + offs, mask=mask & here, other=0.0).to(tl.float32)
        acc += weight * y
    tl.store(out_ptr + token * out_stride + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def combine(
    y: torch.Tensor, rows: torch.Tensor, slot_table: torch.Tensor | None, topk_weights: torch.Tensor,
    out: torch.Tensor, *, direct: bool, pdl: bool = False,
) -> None:  # fmt: skip
    """y [rows, H] -> out [T, H]; every element of `out` is written.

    direct: `rows` are the expert ids [T, K] and pair (t, k) lies in row t * K + k; else `rows` is `row_of_pair`.
    """
    tokens, hidden = out.shape
    top_k = topk_weights.shape[1]
    block = min(next_power_of_2(hidden), 1024 if tokens >= 64 else 256)
    _combine_kernel[(tokens, triton.cdiv(hidden, block))](
        y, rows, rows if slot_table is None else slot_table, topk_weights, out, hidden, y.stride(0), out.stride(0),
        K=top_k, DIRECT=direct, HAS_TABLE=direct and slot_table is not None, BLOCK=block, PDL=pdl,
        num_warps=4 if block >= 1024 else 2, **pdl_options(pdl),
    )  # fmt: skip
