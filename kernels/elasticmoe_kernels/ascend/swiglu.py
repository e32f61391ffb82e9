# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call, attr-defined"
"""SwiGLU for Ascend: silu(gate) * up over rows that hold gate and up side by side.

Imports Triton only, so that it lowers where there is no torch (tests/contract/test_ascend_lowering.py).
"""

import triton
import triton.language as tl


@triton.jit
def swiglu(
    gate_up_ptr,  # [R, 2I]: gate, then up
    out_ptr,  # [R, I]
    offset_ptr,  # [G + 1] int32, as in grouped_gemm: rows from offset[groups] on do not exist
    groups,
    intermediate,
    in_stride,
    out_stride,
    BLOCK_I: tl.constexpr,
):
    """In float32, rounded once. Rows dealt out to the cores in turn."""
    core = tl.program_id(0)
    cores = tl.num_programs(0)
    rows = tl.load(offset_ptr + groups)
    for row in range(core, rows, cores):
        in_row = gate_up_ptr + row.to(tl.int64) * in_stride
        out_row = out_ptr + row.to(tl.int64) * out_stride
        for start in range(0, intermediate, BLOCK_I):
            columns = start + tl.arange(0, BLOCK_I)
            inside = columns < intermediate
            gate = tl.load(in_row + columns, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(in_row + intermediate + columns, mask=inside, other=0.0).to(tl.float32)
            value = gate / (1.0 + tl.exp(-gate)) * up
            tl.store(out_row + columns, value.to(out_ptr.dtype.element_ty), mask=inside)
