# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call, attr-defined"
"""Weighted combine for Ascend: each token sums its experts' rows.

Imports Triton only, so that it lowers where there is no torch (tests/contract/test_ascend_lowering.py).
"""

import triton
import triton.language as tl


@triton.jit
def combine(
    y_ptr,  # [R, H], R >= 1
    row_ptr,  # [T, K] int32: the row of pair (t, k), -1 where its expert is not here
    weight_ptr,  # [T, K] float32
    out_ptr,  # [T, H]
    tokens,
    hidden,
    y_stride,
    out_stride,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A token belongs to one core, which sums in float32: no atomics, and no store that reads before it writes.

    A row of -1 is clamped to 0 before the load and its value replaced after it: row 0 may hold anything, infinity
    included, so weighting it with 0 would not do.
    """
    core = tl.program_id(0)
    cores = tl.num_programs(0)
    for token in range(core, tokens, cores):
        for start in range(0, hidden, BLOCK_H):
            columns = start + tl.arange(0, BLOCK_H)
            inside = columns < hidden
            acc = tl.zeros((BLOCK_H,), dtype=tl.float32)
            for k in range(TOP_K):
                row = tl.load(row_ptr + token * TOP_K + k)
                weight = tl.load(weight_ptr + token * TOP_K + k)
                safe = tl.maximum(row, 0).to(tl.int64)
                y = tl.load(y_ptr + safe * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
                acc += tl.where(row >= 0, y * weight, 0.0)
            tl.store(out_ptr + token.to(tl.int64) * out_stride + columns, acc.to(out_ptr.dtype.element_ty), mask=inside)
