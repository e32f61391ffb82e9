# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call, attr-defined"
"""Permute for Ascend: rows of x copied into expert-contiguous order.

Imports Triton only, so that it lowers where there is no torch (tests/contract/test_ascend_lowering.py).
"""

import triton
import triton.language as tl


@triton.jit
def gather_rows(
    x_ptr,  # [T, H]
    token_ptr,  # [R] int32: row r of the output is row token[r] of x
    out_ptr,  # [R, H]
    rows,
    tokens,
    hidden,
    x_stride,
    out_stride,
    BLOCK_H: tl.constexpr,
):
    """One row a step, rows dealt out to the cores in turn. The index is a scalar, so each row is one linear copy; a
    gather by a vector of `pair // K` would become a loop of scalar loads. An index outside [0, tokens) is clamped:
    a masked gather loads before it masks."""
    core = tl.program_id(0)
    cores = tl.num_programs(0)
    for row in range(core, rows, cores):
        token = tl.load(token_ptr + row)
        token = tl.minimum(tl.maximum(token, 0), tokens - 1).to(tl.int64)
        for start in range(0, hidden, BLOCK_H):
            columns = start + tl.arange(0, BLOCK_H)
            inside = columns < hidden
            values = tl.load(x_ptr + token * x_stride + columns, mask=inside, other=0.0)
            tl.store(out_ptr + row.to(tl.int64) * out_stride + columns, values, mask=inside)
