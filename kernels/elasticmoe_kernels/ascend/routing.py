"""From (token, expert) pairs to expert-contiguous rows. Shapes depend on the input's shape alone, never on values."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where each pair's row is. R = T * K rows; those of pairs without a slot come last and are never computed.

    token: [R] int32, the token that row r copies.
    row: [T, K] int32, the row of a pair, -1 where it has none.
    offsets: [S + 1] int32, rows of slot s are [offsets[s], offsets[s + 1]).
    slots: [S] int32, the slot of each group: here group s is slot s.
    """

    token: torch.Tensor
    row: torch.Tensor
    offsets: torch.Tensor
    slots: torch.Tensor


def route(topk_slots: torch.Tensor, num_slots: int) -> Routing:
    """Sorts the pairs by slot, stably.

    Args:
        topk_slots: [T, K] int32 or int64, -1 = not here.
        num_slots: S.
    """
    tokens, top_k = topk_slots.shape
    flat = topk_slots.reshape(-1)
    here = flat >= 0
    key = torch.where(here, flat, num_slots)
    ordered, order = torch.sort(key, stable=True)
    places = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device)
    row = torch.empty_like(places)
    row[order] = places
    bounds = torch.arange(num_slots + 1, dtype=ordered.dtype, device=flat.device)
    return Routing(
        token=(order // top_k).to(torch.int32),
        row=torch.where(here, row, -1).reshape(tokens, top_k),
        offsets=torch.searchsorted(ordered, bounds).to(torch.int32),
        slots=torch.arange(num_slots, dtype=torch.int32, device=flat.device),
    )
