"""Counting the tokens that are routed to a rank's columns, where expert ids become slots."""

from __future__ import annotations

import pytest
import torch

from elasticmoe_patches.platform import torchvision_ops

pytestmark = pytest.mark.process


def test_what_is_here_is_counted_and_nothing_else() -> None:
    torchvision_ops.declare_if_unloadable()
    from elasticmoe_patches.worker.loader import CountingSlots

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
