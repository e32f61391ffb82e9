"""First product and SwiGLU of one slot, plainly."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gemm_swiglu(x: torch.Tensor, w13: torch.Tensor) -> torch.Tensor:
    """x [R, H], w13 [2I, H] (gate rows, then up rows) -> silu(x @ gate.T) * (x @ up.T), [R, I], in their dtype."""
    gate, up = (x @ w13.T).chunk(2, 1)
    return F.silu(gate) * up
