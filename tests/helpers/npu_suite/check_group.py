"""Collectives on tensors of the real torch_npu, each rank in a thread with its own view of one collective region."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions, ReduceScatterOptions

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.comm.npu_group import NpuProcessGroup, install_npu_groups
from elasticmoe_sglang.comm.process_group import make_group
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.errors import CollectiveMismatch

pytestmark = pytest.mark.toolchain

CAPACITY, MEMBERS = 3, (0, 2)


def device_tensor(values: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.empty(values.shape, dtype=values.dtype, device=f"npu:{rank}").copy_(values)


@contextmanager
def group_of(path: str, rank: int) -> Iterator[NpuProcessGroup]:
    """The group as this rank has it, over its own view of the region."""
    torch.npu.set_device(rank)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    region = CollectiveRegion(descriptor, rank, timeout_s=20)
    os.close(descriptor)
    region.register()
    install_npu_groups(region)
    region.set_membership(Membership(ranks=MEMBERS, epoch=1, capacity=CAPACITY))
    group = make_group(region, tuple(range(CAPACITY)), None)
    assert isinstance(group, NpuProcessGroup)
    try:
        yield group
    finally:
        region.close()


def serve(path: str, rank: int) -> dict[str, list[float]]:
    """What one rank sees of an all-reduce, all-gathers, a reduce-scatter and a broadcast."""
    with group_of(path, rank) as group:
        return collectives(group, rank)


def collectives(group: NpuProcessGroup, rank: int) -> dict[str, list[float]]:
    assert [device.type for device in group._device_types] == ["cpu", "npu"]
    mine = device_tensor(torch.tensor([1.0, 2.0]) + rank, rank)
    total = device_tensor(mine.cpu(), rank)
    group.allreduce([total], AllreduceOptions())
    rows = device_tensor(torch.full((CAPACITY * 2,), 9.0), rank)
    group.all_gather_single(rows, mine, AllgatherOptions())
    numbers = device_tensor(torch.full((CAPACITY,), 9), rank)
    group.all_gather_single(numbers, device_tensor(torch.tensor([rank]), rank), AllgatherOptions())
    part = device_tensor(torch.zeros(2), rank)
    group.reduce_scatter_single(part, rows, ReduceScatterOptions())
    sent, options = device_tensor(torch.tensor([float(rank)]), rank), BroadcastOptions()
    options.rootRank = 2
    group.broadcast([sent], options)
    made = {"total": total, "rows": rows, "numbers": numbers, "part": part, "sent": sent}
    assert all(tensor.device == torch.device("npu", rank) for tensor in made.values())
    return {name: tensor.cpu().tolist() for name, tensor in made.items()}


def on_every_rank(run: Callable[[str, int], Any]) -> list[Any]:
    """What each member returns, given the region's path and its rank."""
    fd = os.memfd_create("check-group", os.MFD_CLOEXEC)
    os.ftruncate(fd, CollectiveRegion.region_bytes(CAPACITY, 2, 64 << 10))
    CollectiveRegion.format(fd, capacity=CAPACITY, channels=2, window_bytes=64 << 10)
    with ThreadPoolExecutor(len(MEMBERS)) as threads:
        results = list(threads.map(lambda rank: run(f"/proc/{os.getpid()}/fd/{fd}", rank), MEMBERS))
    os.close(fd)
    return results


def out_of_order(path: str, rank: int) -> Exception:
    """The ranks' first collectives are each other's second ones."""
    with group_of(path, rank) as group:
        mine = device_tensor(torch.tensor([1.0, 2.0]), rank)
        rows = device_tensor(torch.zeros(CAPACITY * 2), rank)
        calls = [
            lambda: group.allreduce([mine], AllreduceOptions()),
            lambda: group.all_gather_single(rows, mine, AllgatherOptions()),
        ]
        with pytest.raises(CollectiveMismatch) as raised:
            for call in calls if rank == MEMBERS[0] else reversed(calls):
                call()
        return raised.value


def test_ranks_that_call_collectives_in_another_order_all_learn_of_it() -> None:
    errors = on_every_rank(out_of_order)
    assert [error.epoch for error in errors] == [1, 1]
    assert {error.rank for error in errors} <= set(MEMBERS)


def test_npu_tensors_in_the_elastic_group() -> None:
    results = on_every_rank(serve)
    for rank, seen in zip(MEMBERS, results, strict=True):
        assert seen["total"] == [4.0, 6.0]
        assert seen["rows"] == [1.0, 2.0, 0.0, 0.0, 3.0, 4.0], "an absent rank's floats are zero"
        assert seen["numbers"] == [0, 9, 2], "an absent rank's integers stay as the caller filled them"
        assert seen["part"] == [2 * value for value in seen["rows"][2 * rank : 2 * rank + 2]]
        assert seen["sent"] == [2.0]
