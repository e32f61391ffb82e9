"""Communicators prepared an epoch ahead, over gloo: the steps are the same, only the library differs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllreduceOptions, HashStore, ProcessGroupGloo, Store

from elasticmoe_sglang.comm.hccl import EpochGroup, EpochGroups
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import CollectiveMismatch, CommitError, PeerTimeout

shut_down: list[object] = []


class Gloo:
    """ProcessGroupGloo, counted when it is shut down."""

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        self.inner = ProcessGroupGloo(store, rank, size, timeout)

    def allreduce(self, tensors: list[torch.Tensor], opts: AllreduceOptions) -> dist.Work:
        return self.inner.allreduce(tensors, opts)

    def shutdown(self) -> None:
        shut_down.append(self)


@pytest.fixture(autouse=True)
def fresh() -> None:
    shut_down.clear()


def make_ranks(*ranks: int) -> dict[int, EpochGroups]:
    store = HashStore()
    return {rank: EpochGroups(store, rank, device="cpu", build=Gloo) for rank in ranks}


def together(calls: list[Callable[[], object]]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(30) for future in [pool.submit(call) for call in calls]]


def prepare(groups: dict[int, EpochGroups], membership: Membership, attempt: str = "") -> None:
    together(
        [
            lambda rank=rank: groups[rank].prepare(membership, timeout_s=10, attempt=attempt)  # type: ignore[misc]
            for rank in membership.ranks
        ]
    )


def total(current: EpochGroup, value: float) -> float:
    tensor = torch.tensor([value])
    current.group.allreduce([tensor], AllreduceOptions()).wait()
    return float(tensor)


def test_a_rank_joins_while_the_old_group_serves() -> None:
    groups = make_ranks(0, 1, 2, 3)
    two = Membership(ranks=(0, 2), epoch=1, capacity=4)
    prepare(groups, two)
    for rank in two.ranks:
        groups[rank].adopt(1)
    sums: list[float] = []

    # A fixed number of collectives on both sides, so that no thread is left waiting for the other.
    def serve_fixed(rank: int) -> None:
        for _ in range(50):
            sums.append(total(groups[rank].current, 1.0))

    three = two.next((0, 2, 3))
    together([lambda: serve_fixed(0), lambda: serve_fixed(2), lambda: prepare(groups, three)])
    assert sums == [2.0] * 100

    for rank in three.ranks:
        assert groups[rank].adopt(2).membership == three
    assert together([lambda rank=rank: total(groups[rank].current, rank) for rank in three.ranks]) == [5.0] * 3
    assert [groups[rank].retire() for rank in three.ranks] == [[1], [1], []]
    assert len(shut_down) == 2
    assert groups[0].retire() == []


def test_rollback_and_another_try_under_the_same_epoch() -> None:
    groups = make_ranks(0, 1, 2)
    one = Membership(ranks=(0,), epoch=0, capacity=3)
    prepare(groups, one)
    groups[0].adopt(0)
    target = one.next((0, 1))
    prepare(groups, target, attempt="op-1")
    for rank in (0, 1):
        groups[rank].discard(1)
        groups[rank].discard(1)  # an undo may run twice
    assert len(shut_down) == 2
    other = one.next((0, 2))
    prepare(groups, other, attempt="op-2")
    assert groups[0].adopt(1).membership == other
    with pytest.raises(CommitError, match="cannot be discarded"):
        groups[0].discard(1)


def test_a_member_that_does_not_come() -> None:
    groups = make_ranks(0, 1)
    with pytest.raises(PeerTimeout, match=r"did not form in 0.5 s.*rank 0, epoch 3"):
        groups[0].prepare(Membership(ranks=(0, 1), epoch=3, capacity=2), timeout_s=0.5)
    with pytest.raises(CommitError, match="not prepared"):
        groups[0].adopt(3)


def test_a_group_that_miscounts_is_refused() -> None:
    class Lonely(Gloo):
        def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
            super().__init__(store, 0, 1, timeout)

    groups = EpochGroups(HashStore(), 0, device="cpu", build=Lonely)
    with pytest.raises(CollectiveMismatch, match="counted 1 ranks of 2"):
        groups.prepare(Membership(ranks=(0, 1), epoch=1, capacity=2), timeout_s=5)
    assert len(shut_down) == 1


def test_misuse() -> None:
    groups = make_ranks(0, 1)
    alone = Membership(ranks=(0,), epoch=0, capacity=2)
    with pytest.raises(CommitError, match="no communicator"):
        _ = groups[0].current
    with pytest.raises(CommitError, match="no member"):
        groups[1].prepare(alone, timeout_s=1)
    groups[0].prepare(alone, timeout_s=5)
    groups[0].prepare(alone, timeout_s=5)  # stands already
    with pytest.raises(CommitError, match="other members"):
        groups[0].prepare(Membership(ranks=(0, 1), epoch=0, capacity=2), timeout_s=1)
