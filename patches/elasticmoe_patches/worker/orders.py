"""The top of an iteration where attention is tensor-parallel: the ranks of a replica do the same things there.

Requests come to the rank that leads the replica, windows into retiring ranks' KV to each of its ranks; when all are
there, the leader orders what is resumed or given up in this iteration (`replica.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from elasticmoe_patches.worker.commit import resume, resume_retirement
from elasticmoe_patches.worker.inbox import RetirementKey
from elasticmoe_patches.worker.kv import adopt_capacity, publish_use
from elasticmoe_patches.worker.replica import Arrivals, Orders, Replica
from elasticmoe_patches.worker.requests import give_up_waiting
from elasticmoe_patches.worker.worker import Worker
from elasticmoe_sglang.wire.to_worker import CommitCommand, GaveUp

if TYPE_CHECKING:
    from elasticmoe_patches.srt.managers.io_struct import ElasticResumeReq


def join_replica(scheduler: Any, worker: Worker) -> None:
    """Set `worker.replica`, and have the KV capacity of the rank that has least.

    Raises:
        CollectiveError: another rank of the replica did not come.
    """
    jobs = worker.kv.jobs if worker.kv is not None else None
    worker.replica = Replica(scheduler, worker.rank, worker.mates, jobs, worker.region.control)
    if worker.kv is not None:
        tokens = scheduler.token_to_kv_pool_allocator.size
        least = worker.replica.least(tokens)
        if least < tokens:
            adopt_capacity(scheduler, worker)(least)


def step_together(scheduler: Any, worker: Worker, replica: Replica, command: CommitCommand | None = None) -> bool:
    """Do what has come to all ranks of the replica. True if all have this commit of a recovery.

    Raises:
        CollectiveError: a rank of the replica did not come. WorkerError: the ranks differ.
    """
    waiting = worker.recovery.sent_again or worker.recovery.give_ups or worker.inbox.ready(sent=True)
    ordering, committing = replica.agree(
        _resizing(scheduler, worker),
        orders=worker.leads and bool(waiting),
        commit=None if command is None else (command.epoch, command.attempt),
    )
    if worker.kv is not None:
        publish_use(scheduler, worker)
    if ordering:
        _carry_out(scheduler, worker, replica.exchange(_arrivals(worker), lambda of_all: _compose(worker, of_all)))
    return committing


def _resizing(scheduler: Any, worker: Worker) -> Any:
    return adopt_capacity(scheduler, worker) if worker.kv is not None else None


def _arrivals(worker: Worker) -> Arrivals:
    return Arrivals(
        ready=worker.inbox.ready(sent=worker.leads),
        give_ups=tuple(message.operation_id for message in list(worker.recovery.give_ups)),
    )


def _compose(worker: Worker, of_all: list[Arrivals]) -> Orders:
    """The leader's orders: what it and all other ranks are ready for."""
    from elasticmoe_patches.srt.managers.io_struct import to_wire

    mine, others = of_all[0], of_all[1:]
    sent_again, worker.recovery.sent_again = worker.recovery.sent_again, []
    keys: list[RetirementKey] = [key for key in mine.ready if all(key in each.ready for each in others)]
    held = {key: worker.inbox.messages(key) for key in keys}
    messages: list[ElasticResumeReq] = [*sent_again, *(message for key in keys for message in held[key])]
    aborted = worker.inbox.aborted
    return Orders(
        sent_again=[to_wire(message) for message in sent_again],
        retirements=[
            (key, all(each.ready[key] for each in of_all), [to_wire(message) for message in held[key]]) for key in keys
        ],
        give_ups=tuple(name for name in mine.give_ups if all(name in each.give_ups for each in others)),
        aborted=frozenset(message.request.rid for message in messages if aborted.reaches(message.request.rid)),
    )


def _carry_out(scheduler: Any, worker: Worker, orders: Orders) -> None:
    from elasticmoe_patches.srt.managers.io_struct import from_wire

    sent_again: list[ElasticResumeReq] = [from_wire(data) for data in orders.sent_again]
    for message in sent_again:
        resume(scheduler, worker, message, aborted=message.request.rid in orders.aborted)
    for key, with_kv, encoded in orders.retirements:
        messages = [from_wire(data) for data in encoded]
        window = worker.inbox.take(key).window
        resume_retirement(scheduler, worker, key, messages, window, with_kv=with_kv, aborted=orders.aborted)
    for name in orders.give_ups:
        _give_up(scheduler, worker, name)


def _give_up(scheduler: Any, worker: Worker, operation_id: str) -> None:
    """Another replica has joined: requests that wait here may begin there."""
    give_ups = worker.recovery.give_ups
    message = next(each for each in give_ups if each.operation_id == operation_id)
    give_ups.remove(message)
    rids = give_up_waiting(scheduler, message.share) if message.epoch == worker.region.epoch else []
    worker.fault_point("spread.given")
    worker.agent.post(GaveUp(rank=worker.rank, operation_id=message.operation_id, rids=rids))
