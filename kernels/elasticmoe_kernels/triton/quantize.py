# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"
"""Activations to e4m3 with one float32 scale for each token and group of 128 columns (DeepSeek-V3's recipe)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elasticmoe_kernels.triton.launch import pdl_options

GROUP = 128


@triton.jit
def quantize_tile(a):
    """[rows, 128] -> (e4m3 tile, float32 scale [rows]); a * 1 = tile * scale. 448 is the largest e4m3 value."""
    wide = a.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(wide), axis=1), 1e-10) / 448.0
    return (wide / scale[:, None]).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["rows"])
def _quantize_kernel(x_ptr, q_ptr, scale_ptr, groups, rows, hidden, x_stride, q_stride, scale_stride,
                     BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = index // groups
    group = index % groups
    offs = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = (row < rows)[:, None] & (offs < hidden)
    a = tl.load(x_ptr + row[:, None] * x_stride + offs, mask=mask, other=0.0)
    q, scale = quantize_tile(a)
    tl.store(q_ptr + row[:, None] * q_stride + offs, q, mask=mask)
    tl.store(scale_ptr + row * scale_stride + group, scale, mask=row < rows)


def quantize(x: torch.Tensor, *, pdl: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] -> (e4m3 [T, H], float32 [T, ceil(H / 128)])."""
    rows, hidden = x.shape
    groups = triton.cdiv(hidden, GROUP)
    q = torch.empty(rows, hidden, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, groups, dtype=torch.float32, device=x.device)
    block = 16
    _quantize_kernel[(triton.cdiv(rows * groups, block),)](
        x, q, scale, groups, rows, hidden, x.stride(0), q.stride(0), scale.stride(0), BLOCK=block, PDL=pdl,
        num_warps=4, **pdl_options(pdl),
    )  # fmt: skip
    return q, scale
