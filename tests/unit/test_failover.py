"""Deaths that overlap a recovery: each attempt starts from the latest committed view, and none ends the server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.coordinator.failover import FailoverController
from elasticmoe_sglang.coordinator.observer import Observer, Recovery
from elasticmoe_sglang.errors import ElasticMoEError, HmmUnavailable, WorkerError
from elasticmoe_sglang.planner import Placement, initial_placement
from elasticmoe_sglang.planner.recovery import RecoveryPlan

CAPACITY, COLUMNS = 4, 16
Outcome = Callable[["Cluster", RecoveryPlan], Awaitable[int]]


class Told(Observer):
    """What an observer was told."""

    def __init__(self) -> None:
        self.lost: list[int] = []
        self.recoveries: list[Recovery] = []

    def on_rank_lost(self, rank: int) -> None:
        self.lost.append(rank)

    def on_recovered(self, recovery: Recovery) -> None:
        self.recoveries.append(recovery)


class Cluster:
    """The coordinator and its workers, as far as a recovery sees them. One outcome for each attempt; then success."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.committed = Membership(ranks=(0, 1, 2, 3), epoch=7, capacity=CAPACITY)
        self.placement: Placement = initial_placement(COLUMNS, self.committed.ranks)
        self.adopted = self.committed
        self.outcomes = outcomes
        self.plans: list[RecoveryPlan] = []
        self.times: list[float] = []
        self.resent = 0
        self.holds: list[ElasticMoEError] = []
        self.failures: list[str] = []
        self.observer = Told()
        self.controller = FailoverController(
            cast(Any, self),
            cast(Any, self),
            deadline_s=1.0,
            attempt_s=5.0,
            give_up_s=2.0,
            on_failure=self.failures.append,
            memory_whole=self._whole,
            tidy=self._tidy,
            observer=self.observer,
        )

    async def hold(self, reason: ElasticMoEError, *, interrupt: str | None = None) -> None:
        self.holds.append(reason)

    def resume(self, reason: ElasticMoEError) -> None:
        self.holds.remove(reason)

    def membership(self) -> Membership:
        return self.committed

    def adopt(self, membership: Membership, placement: Placement) -> None:
        self.adopted, self.placement = membership, placement

    async def recover(self, plan: RecoveryPlan, _deadline_s: float) -> int:
        self.plans.append(plan)
        self.times.append(time.monotonic())
        await asyncio.sleep(0)
        if self.outcomes:
            return await self.outcomes.pop(0)(self, plan)
        return await commit(self, plan)

    async def resend_open(self) -> int:
        self.resent += 1
        return 1

    async def _whole(self, _timeout_s: float) -> None:
        return

    async def _tidy(self) -> int:
        return 0

    async def settle(self) -> None:
        task = self.controller._task
        assert task is not None
        await asyncio.wait_for(task, 20)

    def check(self, ranks: tuple[int, ...]) -> None:
        assert not self.failures and not self.holds
        assert self.adopted == self.committed and self.committed.ranks == ranks
        assert set(self.placement.owners) <= set(ranks), "a column is owned by an inactive rank"
        told = self.observer.recoveries
        assert {rank for recovery in told for rank in recovery.dead} == set(self.observer.lost)
        assert told[-1].ranks == list(ranks) and sum(recovery.requests_resent for recovery in told) == self.resent


async def commit(cluster: Cluster, plan: RecoveryPlan) -> int:
    cluster.committed = plan.membership
    return 0


async def fail(_cluster: Cluster, _plan: RecoveryPlan) -> int:
    raise WorkerError("the IMM refused: rank 0 is taken")


def committed_then(then: Callable[[Cluster], None], error: Exception) -> Outcome:
    async def outcome(cluster: Cluster, plan: RecoveryPlan) -> int:
        cluster.committed = plan.membership
        then(cluster)
        raise error

    return outcome


def recovered(outcomes: list[Outcome], *, lost: int) -> Cluster:
    """The cluster after it has lost a rank and recovered, or given up."""

    async def main() -> Cluster:
        cluster = Cluster(outcomes)
        cluster.controller.rank_lost(lost, f"rank {lost} exited")
        await cluster.settle()
        return cluster

    return asyncio.run(main())


def test_a_survivor_dies_between_the_commit_and_its_report() -> None:
    """Once the next attempt planned from the old placement, and columns stayed with an inactive rank."""

    cluster = recovered(
        [committed_then(lambda c: c.controller.rank_lost(2, "rank 2 exited"), WorkerError("rank 2 exited"))], lost=3
    )
    assert [plan.dead for plan in cluster.plans] == [(3,), (2,)]
    if cluster.plans[1].replaced:
        cluster.check((0, 1, 2))
    else:
        cluster.check((0, 1))


def test_a_failure_after_the_commit_is_no_failed_recovery() -> None:
    """The HMM is away while memory is tidied up: the requests are sent again, nobody is recovered twice."""

    cluster = recovered([committed_then(lambda _: None, HmmUnavailable("no HMM answers"))], lost=3)
    cluster.check((0, 1, 2))
    assert (len(cluster.plans), cluster.resent) == (1, 1)


def test_attempts_wait_for_each_other() -> None:
    """Five attempts were once over within milliseconds, while the replacement of rank 0 booted."""

    cluster = recovered([fail, fail, fail, fail], lost=0)
    cluster.check((0, 1, 2, 3))
    assert cluster.observer.recoveries[0].seconds >= cluster.times[-1] - cluster.times[0]
    gaps = [late - early for early, late in zip(cluster.times, cluster.times[1:], strict=False)]
    assert gaps == sorted(gaps) or min(gaps) > 0.05
    assert gaps[0] >= 0.09 and sum(gaps) > 1.0


def test_attempts_end_and_say_so() -> None:
    cluster = recovered([fail] * 100, lost=1)
    assert not cluster.holds
    assert len(cluster.failures) == 1 and "[1]" in cluster.failures[0] and "is taken" in cluster.failures[0]
    assert any(plan.replaced for plan in cluster.plans) and any(not plan.replaced for plan in cluster.plans)


def test_a_survivor_that_is_lost_ends_the_attempt() -> None:
    """Once the attempt went on until a replacement had booted, and the next one replaced every rank, for 50 s."""

    async def boot(cluster: Cluster, _plan: RecoveryPlan) -> int:
        asyncio.get_running_loop().call_later(0.05, cluster.controller.rank_lost, 1, "rank 1 exited")
        await asyncio.sleep(4)
        raise AssertionError("it was not cancelled")

    cluster = recovered([boot], lost=0)
    assert [(plan.dead, plan.replaced) for plan in cluster.plans] == [((0,), (0,)), ((0, 1), (0,))]
    assert cluster.times[1] - cluster.times[0] < 1
    cluster.check((0, 2, 3))


def test_a_loss_that_comes_after_its_consequence_replaces_nobody() -> None:
    """A survivor's connection fails before its death is reported; what is left has room for all columns."""

    async def unconnected(cluster: Cluster, _plan: RecoveryPlan) -> int:
        asyncio.get_running_loop().call_later(0.02, cluster.controller.rank_lost, 2, "rank 2 exited")
        raise WorkerError("the worker of rank 2 is not connected")

    cluster = recovered([unconnected], lost=1)
    assert [(plan.dead, plan.replaced) for plan in cluster.plans] == [((1,), ()), ((1, 2), ())]
    cluster.check((0, 3))


def test_an_error_of_another_kind_ends_the_hold() -> None:
    """Once it ended the task alone, and every later change was refused."""

    async def broken(_cluster: Cluster, _plan: RecoveryPlan) -> int:
        raise TypeError("object of type 'NoneType' has no len()")

    cluster = recovered([broken], lost=1)
    assert not cluster.holds
    assert len(cluster.failures) == 1 and "TypeError" in cluster.failures[0]


@pytest.mark.parametrize("second", [0, 1, 2, 3])
def test_a_rank_that_is_lost_again_while_it_is_recovered(second: int) -> None:
    async def commit_and_lose(cluster: Cluster, plan: RecoveryPlan) -> int:
        cluster.committed = plan.membership
        cluster.controller.rank_lost(second, f"rank {second} exited")
        return 0

    cluster = recovered([commit_and_lose], lost=0)
    assert [plan.dead for plan in cluster.plans] == [(0,), (second,)]
    cluster.check((0, 1, 2, 3) if second == 0 else tuple(rank for rank in range(4) if rank != second))
