"""Second product of one slot, plainly."""

from __future__ import annotations

import torch


def gemm_down(h: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """h [R, I], w2 [H, I] -> h @ w2.T, [R, H], in their dtype."""
    return h @ w2.T
