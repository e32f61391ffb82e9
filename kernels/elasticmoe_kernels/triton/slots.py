# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"
"""From the router's expert ids to this rank's slots, without the rows of inactive ranks: one launch, capturable.

Data-parallel attention gathers one equal part of rows from every rank, inactive ranks' parts included. Nothing has to
be computed for those: which ranks are there is read from the windows' control block (`windows.py`) at every launch, so
a captured graph follows the membership.

An expert that several ranks hold is computed by one of them for each row: rows take turns, and the table says for each
turn which experts are computed here. All ranks see the same rows, so they agree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elasticmoe_kernels.errors import ShapeError
from elasticmoe_kernels.triton import windows

_BLOCK = 1024


@triton.jit(do_not_specialize=["pairs", "rows", "members"])
def _slots_kernel(ids_ptr, table_ptr, members, out_ptr, counts_ptr, pairs, rows, stride, TOP_K: tl.constexpr,
                  PARTS: tl.constexpr, COUNT: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wanted = at < pairs
    here = wanted
    if PARTS:
        present = tl.load(tl.cast(members, tl.int64).to(tl.pointer_type(tl.int64)))
        rank = (at // TOP_K // rows).to(tl.int64)
        here = wanted & (((present >> rank) & 1) != 0)
    ids = tl.load(ids_ptr + at, mask=here, other=-1)
    place = ids
    if TURNS > 1:
        row = at // TOP_K
        turn = row
        if PARTS:
            turn = row % rows + row // rows
        place = ids + (turn % TURNS) * stride
    slot = tl.load(table_ptr + place, mask=here & (ids >= 0), other=-1)
    tl.store(out_ptr + at, slot, mask=wanted)
    if COUNT:
        tl.atomic_add(counts_ptr + ids, 1, mask=slot >= 0, sem="relaxed")


def slots_of_rows(
    topk_ids: torch.Tensor,
    table: torch.Tensor,
    *,
    control: int,
    rows_per_rank: int | None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Slots [T, K] int32 of the experts `topk_ids` [T, K] (int32 or int64); -1: not on this rank, or an absent row.

    Args:
        table: int32 [turns, experts or more], in each turn expert id -> slot, -1 for not here. A row's turn is
            `reference.route.turns_of_rows`.
        control: address of the windows' control block (`Windows.control`).
        counts: int64 [experts]: one is added at each expert that is here and for each row that it is chosen for.
        rows_per_rank: row r belongs to rank r // rows_per_rank; None: no row is an absent rank's.

    Raises:
        ShapeError: T is no multiple of rows_per_rank, or ids that are not contiguous.
    """
    tokens, top_k = topk_ids.shape
    if not topk_ids.is_contiguous():
        raise ShapeError("topk_ids must be contiguous")
    if rows_per_rank is not None and (rows_per_rank < 1 or tokens % rows_per_rank):
        raise ShapeError(f"{tokens} rows are not {rows_per_rank} of every rank")
    slots = torch.empty(tokens, top_k, dtype=torch.int32, device=topk_ids.device)
    if not tokens:
        return slots
    pairs = tokens * top_k
    _slots_kernel[(triton.cdiv(pairs, _BLOCK),)](
        topk_ids, table, control + 8 * windows.MEMBERS, slots, table if counts is None else counts, pairs,
        rows_per_rank or 1, table.stride(0), TOP_K=top_k, PARTS=rows_per_rank is not None, COUNT=counts is not None,
        TURNS=table.shape[0], BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return slots
