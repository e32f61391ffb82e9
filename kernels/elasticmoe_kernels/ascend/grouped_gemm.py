# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call, attr-defined"
"""Grouped GEMM on expert columns for Ascend: one weight matrix a group of rows, weights wherever their slot is mapped.

Imports Triton only, so that it lowers where there is no torch (tests/contract/test_ascend_lowering.py).
"""

import triton
import triton.language as tl


@triton.jit
def grouped_gemm(
    a_ptr,  # [R, K], rows of a group next to each other
    w_ptr,  # [S, N, K], dim 0 with any pitch, dims 1-2 contiguous
    out_ptr,  # [R, N]
    offset_ptr,  # [G + 1] int32: rows of group g are [offset[g], offset[g + 1])
    slot_ptr,  # [G] int32: the slot of group g, -1 where it is not on this rank
    groups,
    N,
    K,
    a_stride,
    w_pitch,  # elements from one slot to the next; 64 bit, since a column is hundreds of MiB
    out_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[r] = a[r] @ w[slot of r's group].T, accumulated in float32.

    The grid is at most the number of cores. A core goes over all groups and takes every `cores`-th tile; where a
    group starts in that turn follows from the tiles before it, so that small groups do not all land on core 0. A
    group without rows or without a slot has no tile: nothing is read through its slot, which may have no memory.
    Rows of such a group, and rows from offset[G] on, keep what `out` held.
    """
    core = tl.program_id(0)
    cores = tl.num_programs(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_before = 0
    for group in range(groups):
        low = tl.load(offset_ptr + group)
        high = tl.load(offset_ptr + group + 1)
        slot = tl.load(slot_ptr + group)
        tiles = tl.where(slot >= 0, tl.cdiv(high - low, BLOCK_M) * tiles_n, 0)
        first = (core + cores - tiles_before % cores) % cores
        for tile in range(first, tiles, cores):
            rows = low + (tile // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
            columns = (tile % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
            w_base = w_ptr + slot.to(tl.int64) * w_pitch
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for start in range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                a_inside = (rows[:, None] < high) & (k[None, :] < K)
                a = tl.load(a_ptr + rows[:, None] * a_stride + k[None, :], mask=a_inside, other=0.0)
                w_inside = (columns[:, None] < N) & (k[None, :] < K)
                w = tl.load(w_base + columns[:, None] * K + k[None, :], mask=w_inside, other=0.0)
                acc = tl.dot(a, tl.trans(w), acc)
            out_inside = (rows[:, None] < high) & (columns[None, :] < N)
            out = acc.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], out, mask=out_inside)
        tiles_before += tiles
