"""Weighted combine, plainly."""

from __future__ import annotations

import torch


def combine(y: torch.Tensor, row_of_pair: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
    """y [rows, H], row_of_pair [T, K] (-1 = absent), topk_weights [T, K] -> [T, H] in y's dtype, k after k."""
    out = torch.zeros(topk_weights.shape[0], y.shape[1], dtype=y.dtype, device=y.device)
    for k in range(topk_weights.shape[1]):
        token = (row_of_pair[:, k] >= 0).nonzero().squeeze(1)
        out[token] += y[row_of_pair[token, k].long()] * topk_weights[token, k].to(y.dtype)[:, None]
    return out
