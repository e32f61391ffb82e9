"""A column's holders compute each row once: the tables of all ranks together, through every way from ids to slots."""

from __future__ import annotations

import pytest
import torch

from elasticmoe_kernels import moe_experts
from elasticmoe_kernels.reference.route import slots_of_rows, turns_of_rows
from elasticmoe_patches.platform import torchvision_ops
from elasticmoe_sglang.planner import TURNS, Placement
from elasticmoe_sglang.planner.placement import turns_of

pytestmark = pytest.mark.process

EXPERTS, HIDDEN, INTER, TOP_K = 6, 32, 16, 3
PLACEMENT = Placement(owners=(0, 1, 2, 3, 0, 1), copies=((0, 1), (0, 3), (2, 0), (3, 0), (3, 1), (3, 2)))
RANKS = (0, 1, 2, 3)


def table_of(rank: int, placement: Placement = PLACEMENT) -> torch.Tensor:
    """As `WorkerWeights.switch` writes it, entry by entry."""
    table = torch.full((TURNS, EXPERTS + 1), -1, dtype=torch.int32)
    shared = placement.shared_by(rank)
    for column in placement.columns_of(rank):
        for turn in turns_of(column, *shared.get(column, (0, 1))):
            table[turn, column] = column
    return table


def ids_of(rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(rows)])


@pytest.mark.parametrize("rows_per_rank", [None, 1, 2, 5])
def test_turns_are_used_alike_by_the_first_rows_of_padded_parts(rows_per_rank: int | None) -> None:
    each = rows_per_rank or 1
    turns = turns_of_rows(12 * each, rows_per_rank, TURNS)
    first = turns[::each]
    for holders in (2, 3, 4, 6):
        assert torch.bincount(first % holders).tolist() == [12 // holders] * holders


@pytest.mark.parametrize("rows", [1, 2, 7, 70])
def test_every_pair_is_computed_by_one_rank(rows: int) -> None:
    ids = ids_of(rows, rows)
    found = torch.stack([slots_of_rows(ids, table_of(rank)) for rank in RANKS])
    assert torch.equal((found >= 0).sum(0), torch.ones_like(ids)) and torch.equal(found.amax(0), ids.to(torch.int32))


@pytest.mark.parametrize("equal_parts", [False, True])
def test_the_lookup_on_the_cpu_is_the_reference(equal_parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_ops.declare_if_unloadable()
    from elasticmoe_patches.worker import loader

    def rows_of_each(rows: int, ranks: int) -> int | None:
        return rows // ranks if equal_parts and rows % ranks == 0 else None

    monkeypatch.setattr(loader, "rows_of_each", rows_of_each)
    table = table_of(1)
    slots = loader.TurnSlots(table, parts=4)
    counts = torch.zeros(EXPERTS, dtype=torch.int64)
    counting = loader.CountingSlots(slots, counts)
    monkeypatch.setattr(loader.CountingSlots, "SURE_ROWS", 0)
    expected = torch.zeros(EXPERTS, dtype=torch.int64)
    for rows in (8, 8, 5, 0, 64):  # the same shape again, and others
        ids = ids_of(rows, rows) if rows else torch.empty(0, TOP_K, dtype=torch.int64)
        wanted = slots_of_rows(ids, table, rows_of_each(rows, 4))
        assert torch.equal(slots[ids], wanted) and slots[ids].dtype == torch.int32
        assert torch.equal(counting[ids.to(torch.int32)], wanted)
        expected += torch.bincount(wanted[wanted >= 0].long(), minlength=EXPERTS)
    assert counts.tolist() == expected.tolist(), "what others compute in their turns is not counted"
    ids = ids_of(8, 8)
    table[:] = table_of(1, Placement(owners=PLACEMENT.owners))  # a change dropped the copies
    assert torch.equal(slots[ids], torch.where(ids % 4 == 1, ids, -1).to(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 6, 90])
def test_the_sum_over_ranks_is_that_of_one_rank(rows: int, dtype: torch.dtype) -> None:
    """Whichever rank computes a pair: its product is the same, only the cuts of the sum differ."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, HIDDEN, generator=generator).to(dtype)
    w13 = torch.randn(EXPERTS, 2 * INTER, HIDDEN, generator=generator).to(dtype)
    w2 = torch.randn(EXPERTS, HIDDEN, INTER, generator=generator).to(dtype)
    weights = torch.rand(rows, TOP_K, generator=generator).float()
    ids = ids_of(rows, rows)
    whole = moe_experts(x, w13, w2, ids, weights)
    parts = sum(moe_experts(x, w13, w2, slots_of_rows(ids, table_of(rank)), weights) for rank in RANKS)
    limit = 1e-5 if dtype == torch.float32 else 1e-12
    assert float((parts - whole).abs().max() / whole.abs().max()) < limit
