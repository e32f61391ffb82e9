"""Recovery after a rank's death.

A dead rank fails the same collective on every survivor, because no collective completes without all members; the
leader's death at the commit barrier fails the barrier for all participants. So all survivors stop at the same point:
each sets its own requests aside, waits for the coordinator's commit, meets the others at the commit barrier, and
enters SGLang's event loop again. Requests of the dead rank are sent again by the tokenizer, which knows what their
clients have received (`journal.py`).
"""

from __future__ import annotations

import logging
import queue
import time
from typing import Any

from elasticmoe_patches.worker.commit import receive_migrated, resume_ready, send_fence
from elasticmoe_patches.worker.kv import run_kv_jobs
from elasticmoe_patches.worker.orders import step_together
from elasticmoe_patches.worker.replica import Replica
from elasticmoe_patches.worker.requests import give_up_waiting, live_requests, set_aside
from elasticmoe_patches.worker.worker import Worker
from elasticmoe_sglang.errors import CollectiveError, CollectiveMismatch, CommitError
from elasticmoe_sglang.wire.to_coordinator import Broken
from elasticmoe_sglang.wire.to_worker import CommitCommand, Counted, GaveUp

logger = logging.getLogger(__name__)

_FENCE_DEADLINE_S = 2.0
# How often a waiting survivor checks for KV to give up (for the dead rank's columns) and for migrated requests.
_POLL_S = 0.005


def recover(scheduler: Any, worker: Worker, error: CollectiveError | CommitError) -> None:
    """Set requests aside and return as a member of the next epoch."""
    logger.warning("rank %d: %s", worker.rank, error)
    reason = f"rank {error.rank} was lost" if error.rank is not None else error.what
    if worker.pending is not None:
        worker.refuse_commit(worker.pending, reason)
        worker.pending = None
    kept = set_aside(scheduler, worker.iteration)
    # Ranks that do not do the same accuse each other; none of them has stalled.
    missed = None if isinstance(error, CollectiveMismatch) else error.rank
    worker.agent.post(Broken(rank=worker.rank, epoch=worker.region.epoch, culprit=-1 if missed is None else missed))
    wait = _wait_alone if worker.replica is None else _Together(worker.replica).wait
    # Without a deadline of its own: the coordinator decides when to give up, and ends the server then.
    while True:
        # A change that is finishing waits until its retiring ranks' requests have been resumed; the commit comes after.
        receive_migrated(worker)
        command = wait(scheduler, worker)
        if command is not None and worker.commit_recovery(command):
            break
    if worker.replica is not None:
        worker.replica.require_same_requests()
    worker.recovery.give_ups.clear()  # what is given up from here on would be missed by nobody
    if worker.leads:
        report(scheduler, worker, command.operation_id)
    logger.info("rank %d continues in epoch %d with %d requests set aside", worker.rank, command.epoch, kept)


def _wait_alone(scheduler: Any, worker: Worker) -> CommitCommand | None:
    """Do what has to be done while the others recover. Returns a commit that has come."""
    run_kv_jobs(scheduler, worker)
    resume_ready(scheduler, worker)
    answer_give_ups(scheduler, worker)
    return _next_command(worker)


def _next_command(worker: Worker) -> CommitCommand | None:
    try:
        return worker.recovery.commands.get(timeout=_POLL_S)
    except queue.Empty:
        return None


class _Together:
    """The same in step with the other ranks of the replica, which all go on with the same commit."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._command: CommitCommand | None = None
        self._apart = False

    def wait(self, scheduler: Any, worker: Worker) -> CommitCommand | None:
        """As `_wait_alone`. Raises ReplicaLost when a rank of the replica is gone."""
        self._replica.leave_if_one_is_lost()
        self._command = _next_command(worker) or self._command
        if not self._apart:
            try:
                if not step_together(scheduler, worker, self._replica, self._command):
                    return None
            except CollectiveError as error:
                # Perhaps the ranks of the replica have failed at two points. Whether they still have the same is
                # compared when they have met in the next epoch.
                logger.warning("rank %d waits apart from its replica: %s", worker.rank, error)
                self._apart = True
        command, self._command = self._command, None
        return command


def answer_give_ups(scheduler: Any, worker: Worker) -> None:
    """Another rank has joined: requests that wait here may begin there."""
    give_ups = worker.recovery.give_ups  # always the same list: the agent's thread appends to it
    while give_ups:
        message = give_ups.pop(0)
        # One of an earlier epoch is not waited for any more: all requests have been counted since.
        rids = give_up_waiting(scheduler, message.share) if message.epoch == worker.region.epoch else []
        worker.fault_point("spread.given")
        worker.agent.post(GaveUp(rank=worker.rank, operation_id=message.operation_id, rids=rids))


def answer_counts(scheduler: Any, worker: Worker) -> None:
    """A retiring rank died while migrating: report which requests are here, so that the others are sent again."""
    counts = worker.recovery.counts
    # The fence comes to the rank that leads a replica, which reports for it.
    for message in [count for count in counts if not worker.leads or count.operation_id in worker.fences]:
        counts.remove(message)
        receive_migrated(worker)
        for rank in message.forget:
            worker.inbox.forget(rank)
        worker.recovery.give_ups.clear()
        if worker.leads:
            report(scheduler, worker, message.operation_id)


def report(scheduler: Any, worker: Worker, operation_id: str) -> None:
    """Report which requests are here, once everything that was routed here before the recovery has been read. For the
    rank that leads a replica."""
    iteration = worker.iteration
    deadline = time.monotonic() + _FENCE_DEADLINE_S
    # Out of the reader's sight, which would return it again.
    replay, iteration.replay = iteration.replay, []
    while operation_id not in worker.fences and time.monotonic() < deadline:
        read = scheduler.request_receiver._pull_raw_reqs()
        replay += read
        iteration.pulled = []
        if not read:
            time.sleep(0.0005)
    iteration.replay = replay
    receive_migrated(worker)
    rids = {req.rid for req, _ in live_requests(scheduler)}
    for request in replay:
        rids |= {item.rid for item in getattr(request, "batch", [request]) if item.rid is not None}
    rids |= {message.request.rid for message in worker.recovery.sent_again}
    rids |= worker.inbox.held()
    send_fence(scheduler, operation_id, worker.rank)
    worker.agent.post(Counted(rank=worker.rank, operation_id=operation_id, rids=sorted(rids)))
