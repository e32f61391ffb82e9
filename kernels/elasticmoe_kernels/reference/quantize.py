"""Block-scaled e4m3, plainly: activations by token and group of 128 columns, weights by 128 x 128 blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

GROUP = 128
MAX_E4M3 = 448.0


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] -> (e4m3 [T, H], float32 scale [T, H / 128]); H a multiple of 128."""
    groups = x.float().view(x.shape[0], -1, GROUP)
    scale = groups.abs().amax(2).clamp(min=1e-10) / MAX_E4M3
    return (groups / scale[:, :, None]).to(torch.float8_e4m3fn).view_as(x), scale


def dequantize(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Inverse of `quantize`, exact in float64."""
    return q.to(dtype) * scale.to(dtype).repeat_interleave(GROUP, 1)


def quantize_weight(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [S, N, K] -> (e4m3 [S, N, K], float32 scale [S, ceil(N / 128), ceil(K / 128)])."""
    s, n, k = w.shape
    padded = F.pad(w.float(), (0, -k % GROUP, 0, -n % GROUP))
    blocks = padded.view(s, -1, GROUP, padded.shape[2] // GROUP, GROUP)
    scale = blocks.abs().amax((2, 4)).clamp(min=1e-10) / MAX_E4M3
    q = (blocks / scale[:, :, None, :, None]).to(torch.float8_e4m3fn)
    return q.view(padded.shape)[:, :n, :k].contiguous(), scale


def dequantize_weight(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """One slot: q [N, K], scale [ceil(N / 128), ceil(K / 128)] -> [N, K]."""
    n, k = q.shape
    wide = scale.to(dtype).repeat_interleave(GROUP, 0)[:n].repeat_interleave(GROUP, 1)[:, :k]
    return q.to(dtype) * wide
