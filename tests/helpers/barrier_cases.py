"""What the workers of the commit barrier's tests do."""

from __future__ import annotations

import time

from elasticmoe_sglang.comm.commit_barrier import CommitBarrier, Decision
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import CommitError
from elasticmoe_sglang.planner import Placement, View
from tests.helpers.workers import WorkerContext

DEADLINE_S = 0.6
GRACE_S = 0.6


def view(ranks: tuple[int, ...], epoch: int, capacity: int) -> View:
    """A view whose placement can be told from that of any other epoch."""
    owners = tuple(ranks[(column + epoch) % len(ranks)] for column in range(8 + epoch % 5))
    membership = Membership(ranks=ranks, epoch=epoch, capacity=capacity)
    return View(membership=membership, placement=Placement(owners=owners))


def arrive(
    context: WorkerContext,
    epoch: int,
    attempt: int,
    participants: tuple[int, ...],
    after: tuple[int, ...],
    delay_s: float = 0.0,
    timeout_s: float = DEADLINE_S,
) -> tuple[Decision, str, Membership]:
    """(decision, reason, the membership that is committed as this process sees it then)."""
    time.sleep(delay_s)
    barrier = CommitBarrier(context.region.control, context.rank)
    decision = barrier.arrive(
        epoch=epoch,
        attempt=attempt,
        participants=participants,
        view=view(after, epoch, context.region.capacity),
        timeout_s=timeout_s,
        grace_s=GRACE_S,
    )
    committed = context.region.control.read_view()
    assert committed == view(committed.ranks, committed.epoch, context.region.capacity)
    return decision, barrier.reason, committed.membership


def join(context: WorkerContext, epoch: int, timeout_s: float) -> tuple[Decision, str, Membership]:
    barrier = CommitBarrier(context.region.control, context.rank)
    decision = barrier.join(epoch, timeout_s=timeout_s, grace_s=GRACE_S)
    return decision, barrier.reason, context.region.control.read_membership()


def cpu_of_waiting(context: WorkerContext, seconds: float) -> float:
    started = time.process_time()
    try:
        CommitBarrier(context.region.control, context.rank).join(1, timeout_s=seconds)
    except CommitError:
        return time.process_time() - started
    raise AssertionError("nobody proposed anything, and yet the commit barrier opened")
