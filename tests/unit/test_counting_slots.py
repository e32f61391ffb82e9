"""Counting the tokens that are routed to a rank's columns, where expert ids become slots."""

from __future__ import annotations

import pytest
import torch

from elasticmoe_patches.platform import torchvision_ops

pytestmark = pytest.mark.process


def test_what_is_here_is_counted_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_ops.declare_if_unloadable()
    from elasticmoe_patches.worker.loader import CountingSlots

    monkeypatch.setattr(CountingSlots, "SURE_ROWS", 0)
    experts = 6
    table = torch.tensor([0, -1, 2, -1, -1, 5, -1], dtype=torch.int32)  # the last: what id -1 finds
    counts = torch.zeros(experts, dtype=torch.int64)
    slots = CountingSlots(table, counts)
    ids = torch.tensor([[0, 1], [0, 2], [5, 4], [-1, -1]])
    found = slots[ids]
    assert torch.equal(found, table[ids]) and found.dtype == torch.int32
    assert counts.tolist() == [2, 0, 1, 0, 0, 1]
    assert slots[torch.empty(0, 2, dtype=torch.long)].shape == (0, 2)
    assert counts.tolist() == [2, 0, 1, 0, 0, 1]
    table[1], table[0] = 1, -1  # a change moved columns
    slots[ids]
    assert counts.tolist() == [2, 1, 2, 0, 0, 2]


def test_of_small_batches_a_sample_is_counted_that_stands_for_all() -> None:
    torchvision_ops.declare_if_unloadable()
    from elasticmoe_patches.worker.loader import CountingSlots

    counts = torch.zeros(3, dtype=torch.int64)
    slots = CountingSlots(torch.tensor([0, 1, -1, -1]), counts)
    lookups = 8000
    for _ in range(lookups):
        slots[torch.tensor([[0, 2]])]
        slots[torch.tensor([[0, 1]])]
    assert counts[2] == 0
    # Binomial, an eighth counted eightfold: the standard deviation is sqrt(n * 7).
    for column, expected in ((0, 2 * lookups), (1, lookups)):
        assert abs(int(counts[column]) - expected) < 5 * (7 * expected) ** 0.5
    before = counts.tolist()
    slots[torch.ones(CountingSlots.SURE_ROWS, 2, dtype=torch.long)]
    assert counts.tolist() == [before[0], before[1] + 2 * CountingSlots.SURE_ROWS, 0]
