"""Routing, plainly: ids -> slots, and the pairs of each slot."""

from __future__ import annotations

import torch


def slots_of(topk_ids: torch.Tensor, slot_table: torch.Tensor | None) -> torch.Tensor:
    """topk_ids [T, K] -> slots [T, K] int64; -1 where the id is -1 or the table (int32 [experts]) says -1."""
    ids = topk_ids.long()
    if slot_table is None:
        return ids
    return torch.where(ids >= 0, slot_table.long()[ids.clamp(min=0)], -1)


def pairs_of_slot(topk_ids: torch.Tensor, slot_table: torch.Tensor | None) -> dict[int, set[int]]:
    """slot -> the pairs t * K + k that go there; slots without pairs are left out."""
    groups: dict[int, set[int]] = {}
    for pair, slot in enumerate(slots_of(topk_ids, slot_table).flatten().tolist()):
        if slot >= 0:
            groups.setdefault(slot, set()).add(pair)
    return groups


def blocks_of_slot(pairs: int, block_m: int) -> list[int]:
    """Rows in each block of a slot that `pairs` pairs go to."""
    return [min(block_m, pairs - first) for first in range(0, pairs, block_m)]
