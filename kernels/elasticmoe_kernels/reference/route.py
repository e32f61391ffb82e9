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


def turns_of_rows(rows: int, rows_per_rank: int | None, turns: int) -> torch.Tensor:
    """int64 [rows]: which turn each row of a gathered batch has, from 0 to turns - 1.

    Rows of a rank's part follow each other, and each part begins one turn after the part before it: so turns are
    equally often used by the first rows of all parts, where parts are padded.

    Args:
        rows_per_rank: row r belongs to rank r // rows_per_rank; None: the rows are one part.
    """
    each = rows_per_rank or max(rows, 1)
    row = torch.arange(rows)
    return (row % each + row // each) % turns


def slots_of_rows(topk_ids: torch.Tensor, table: torch.Tensor, rows_per_rank: int | None = None) -> torch.Tensor:
    """[T, K] expert ids, -1 for none -> slots by the table [turns, experts + 1] of each row's turn, -1 for not here."""
    turns = turns_of_rows(topk_ids.shape[0], rows_per_rank, table.shape[0])
    return torch.where(topk_ids >= 0, table[turns[:, None], topk_ids.long().clamp(min=0)], -1)
