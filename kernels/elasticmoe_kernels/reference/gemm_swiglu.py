"""First product and SwiGLU of one slot, plainly."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gemm_swiglu(x: torch.Tensor, w13: torch.Tensor) -> torch.Tensor:
    """x [R, H], w13 [2I, H] (gate rows, then up rows) -> silu(x @ gate.T) * (x @ up.T), [R, I], in their dtype."""
    gate, up = (x @ w13.T).chunk(2, 1)
    return F.silu(gate) * up


def gemm_clamped_swiglu(
    x: torch.Tensor, w13: torch.Tensor, bias: torch.Tensor, *, alpha: float, limit: float
) -> torch.Tensor:
    """gpt-oss's: x [R, H], w13 [2I, H], bias [2I] -> gate * sigmoid(alpha * gate) * (up + 1), [R, I], in their dtype,
    with gate = min(x @ gate rows.T + bias, limit) and up = x @ up rows.T + bias within -limit ... limit."""
    gate, up = (x @ w13.T + bias).chunk(2, 1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
