"""A hot standby: a worker that has booted for its rank and waits, outside the membership, for a change that it joins.

It has columns of no expert and the least KV; its tensors' addresses, windows, process groups, captured graphs and
loaded kernels stay. It was booted as one, or has retired. Everything here runs in the scheduler's thread, outside
SGLang's event loop.
"""

from __future__ import annotations

import logging
from typing import Any

from elasticmoe_patches.worker.inbox import MigrationInbox
from elasticmoe_patches.worker.kv import adopt_capacity
from elasticmoe_patches.worker.requests import set_aside
from elasticmoe_patches.worker.worker import RecoveryInbox, Worker
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.planner import Placement
from elasticmoe_sglang.wire.to_worker import Join, Park, Parked

logger = logging.getLogger(__name__)


def park(scheduler: Any, worker: Worker) -> None:
    """This rank has retired: give everything back that a hot standby does not need, once survivors have copied it.

    Raises:
        WorkerError: a request is left here. The process ends then, as if it were not to become one.
    """
    message = worker.told(Park)
    worker.fault_point("hot.parking")
    _forget_requests(scheduler, worker)
    scheduler.device_module.synchronize()  # no launched kernel reads columns or KV
    columns = worker.memory.give_up()
    _keep_least_kv(scheduler, worker)
    worker.become_hot()
    kept = worker.kv.chunks if worker.kv is not None else 0
    worker.agent.post(Parked(rank=worker.rank, operation_id=message.operation_id, columns=columns, kv_chunks=kept))
    logger.info("rank %d is a hot standby; %d columns were given up", worker.rank, columns)


def become_hot(scheduler: Any, worker: Worker) -> None:
    """This rank has booted as a hot standby."""
    _keep_least_kv(scheduler, worker)
    worker.become_hot()
    worker.send_hello()
    logger.info("rank %d is a hot standby", worker.rank)


def wait_to_join(scheduler: Any, worker: Worker) -> None:
    """Wait for a change that this rank joins, and take its columns and KV. The commit barrier comes next.

    Raises:
        BudgetExceeded: no memory. WorkerError: a column is on no device. The process ends then, and with it the change.
    """
    message = worker.told(Join)
    spec = worker.begin_to_join(message.join_spec)
    _drop_stale_messages(scheduler, worker)
    placement = Placement(owners=spec.placement, copies=spec.copies)
    worker.memory.pulled_bytes = 0
    worker.memory.take(spec.held, spec.txn or None, placement.shared_by(worker.rank))
    if worker.kv is not None and spec.kv_chunks:
        worker.kv.resize_idle(spec.kv_chunks, spec.txn or None, adopt_capacity(scheduler, worker))
    worker.fault_point("hot.joining")


def _keep_least_kv(scheduler: Any, worker: Worker) -> None:
    if worker.kv is not None:
        worker.kv.resize_idle(worker.kv.shape.least_chunks, None, adopt_capacity(scheduler, worker))


def _forget_requests(scheduler: Any, worker: Worker) -> None:
    """All of them run on survivors. Cached prefixes go too."""
    set_aside(scheduler, worker.iteration)
    scheduler.waiting_queue = []
    scheduler.grammar_manager.grammar_queue = []
    _forget_input(worker)
    if not scheduler.flush_cache(empty_cache=False):
        raise WorkerError("a request was left when the rank had retired, and it cannot wait with it", rank=worker.rank)


def _forget_input(worker: Worker) -> None:
    worker.iteration.replay, worker.iteration.pulled = [], []
    worker.pending = None
    worker.inbox = MigrationInbox()
    worker.recovery = RecoveryInbox()


def _drop_stale_messages(scheduler: Any, worker: Worker) -> None:
    """What was sent here before this rank joins was not for it, or has been sent again to another rank."""
    while scheduler.request_receiver._pull_raw_reqs():
        pass
    _forget_input(worker)
