"""Products with e4m3 weights in blocks of 128 x 128 on CPU: dequantised a band of rows at a time, activations as they
are.

That is what SGLang's own operators for CPUs compute (W8A16); its GPU kernels round activations to e4m3 as well.
"""

from __future__ import annotations

import torch

GROUP = 128
BAND_ELEMENTS = 1 << 22
"""Weight elements that are dequantised together: 16 MiB of float32, at least one row of blocks."""


def dequantize(q: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """q e4m3 [N, K] and scale float32 [ceil(N / 128), ceil(K / 128)] into out [N, K] float32 or float64; returns it.

    In float32 every element is rounded once.
    """
    n, k = q.shape
    out.copy_(q)
    wide = scale.to(out.dtype).repeat_interleave(GROUP, 1)[:, :k]
    whole = n - n % GROUP
    out[:whole].view(-1, GROUP, k).mul_(wide[: n // GROUP, None])
    if whole < n:
        out[whole:].mul_(wide[-1])
    return out


def product(a: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ dequantised q.T. a [R, K], out [R, N], both float32 or both float64; q, scale: see `dequantize`."""
    n, k = q.shape
    rows = max(1, BAND_ELEMENTS // (GROUP * k)) * GROUP
    scratch = a.new_empty(min(rows, n), k)
    for start in range(0, n, rows):
        band = slice(start, min(start + rows, n))
        blocks = slice(start // GROUP, -(-band.stop // GROUP))
        weight = dequantize(q[band], scale[blocks], scratch[: band.stop - start])
        torch.mm(a, weight.t(), out=out[:, band])


def linear(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K] in any float dtype -> x @ dequantised q.T + bias, [..., N] in x's dtype.

    Computed in float32 (float64 for float64) and rounded once. q, scale: see `dequantize`; bias: [N].
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    out = rows.new_empty(rows.shape[0], q.shape[0])
    product(rows, q, scale, out)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], q.shape[0])
