"""What the workers of the gate's tests do."""

from __future__ import annotations

import time

from elasticmoe_sglang.errors import CommitError
from elasticmoe_sglang.seats.gate import CommitGate, Decision
from elasticmoe_sglang.seats.membership import Membership
from tests.helpers.seats import SeatContext

DEADLINE_S = 0.6
GRACE_S = 0.6


def arrive(
    context: SeatContext,
    epoch: int,
    attempt: int,
    participants: tuple[int, ...],
    after: tuple[int, ...],
    delay_s: float = 0.0,
    timeout_s: float = DEADLINE_S,
) -> tuple[Decision, str, Membership]:
    """(decision, reason, the membership that is committed as this process sees it then)."""
    time.sleep(delay_s)
    gate = CommitGate(context.fabric)
    decision = gate.arrive(
        epoch=epoch,
        attempt=attempt,
        participants=participants,
        membership=Membership(seats=after, epoch=epoch, capacity=context.fabric.capacity),
        timeout_s=timeout_s,
        grace_s=GRACE_S,
    )
    return decision, gate.reason, context.fabric.control.read_membership()


def join(context: SeatContext, epoch: int, timeout_s: float) -> tuple[Decision, str, Membership]:
    gate = CommitGate(context.fabric)
    decision = gate.join(epoch, timeout_s=timeout_s, grace_s=GRACE_S)
    return decision, gate.reason, context.fabric.control.read_membership()


def cpu_of_waiting(context: SeatContext, seconds: float) -> float:
    started = time.process_time()
    try:
        CommitGate(context.fabric).join(1, timeout_s=seconds)
    except CommitError:
        return time.process_time() - started
    raise AssertionError("nobody proposed anything, and yet the gate opened")
