"""Going on after a rank's death.

A dead rank fails the same collective on every survivor, because no collective completes without all members; the
leader's death at the commit barrier fails the commit barrier for all who stand there. So all survivors stand at one
point: each sets its own requests aside, waits for the coordinator's `Recover`, meets the others at the commit barrier,
and enters SGLang's event loop anew. Requests of the dead rank are sent again by the tokenizer, which knows what their
clients have received (`journal.py`).
"""

from __future__ import annotations

import logging
import queue
import time
from typing import Any

from elasticmoe_patches.worker.commit import put_fence, receive_migrated, resume_ready
from elasticmoe_patches.worker.kv_jobs import run_kv_jobs
from elasticmoe_patches.worker.migration import live_requests
from elasticmoe_sglang.errors import CollectiveError, CommitError
from elasticmoe_sglang.wire.to_coordinator import Broken
from elasticmoe_sglang.wire.to_worker import Recovered

logger = logging.getLogger(__name__)

# How long a survivor waits for the coordinator before it gives up; then the server ends.
_RECOVER_DEADLINE_S = 30.0
_FENCE_DEADLINE_S = 2.0
# How often a waiting survivor looks whether it shall give up KV for the columns it takes over, or adopt requests.
_LOOK_S = 0.005


def recover(scheduler: Any, worker: Any, error: CollectiveError | CommitError) -> None:
    """Set requests aside and come back as a member of the next epoch.

    Raises:
        CollectiveError, CommitError: `error` again, when the coordinator did not lead the way in time.
    """
    logger.warning("rank %d: %s", worker.rank, error)
    reason = f"rank {error.rank} was lost" if error.rank is not None else error.what
    if worker.pending is not None:
        worker.refuse(worker.pending, reason)
        worker.pending = None
    kept = set_aside(scheduler, worker)
    culprit = -1 if error.rank is None else error.rank
    worker.agent.post(Broken(rank=worker.rank, culprit=culprit))
    worker.recovering = True
    deadline = time.monotonic() + _RECOVER_DEADLINE_S
    while time.monotonic() < deadline:
        run_kv_jobs(scheduler, worker)
        # A change that is finishing waits until its retiring ranks' requests have been taken over, and `Recover` comes
        # after.
        receive_migrated(worker)
        resume_ready(scheduler, worker)
        try:
            command = worker.recoveries.get(timeout=_LOOK_S)
        except queue.Empty:
            continue
        if worker.pass_recovery_barrier(command):
            report(scheduler, worker, command.operation_id)
            logger.info("rank %d goes on in epoch %d with %d requests set aside", worker.rank, command.epoch, kept)
            return
    raise error


def set_aside(scheduler: Any, worker: Any) -> int:
    """Put every started request back into the waiting queue, as SGLang's `pause_generation` does. Returns how many.

    The KV that is known to be whole goes into the radix cache first. The batch that failed may have left its requests
    in any of the places below.
    """
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    _drain(scheduler)
    started = _started(scheduler, worker)
    for req, valid in started:
        _release(scheduler, req, valid)
    scheduler.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
    scheduler.last_batch = None
    scheduler.cur_batch_for_debug = None
    scheduler.chunked_req = None
    worker.new_batch = None
    if getattr(scheduler, "result_queue", None):
        scheduler.result_queue.clear()
    waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
    for req, _ in started:
        scheduler._add_request_to_queue(req)
    scheduler.waiting_queue.extend(waiting)
    worker.replay = [*worker.pulled, *worker.replay]
    worker.pulled = []
    return len(started)


def _drain(scheduler: Any) -> None:
    """Results of batches whose forward pass was complete are good; the failed one never got into the queue."""
    results = getattr(scheduler, "result_queue", None)
    while scheduler.enable_overlap and results:
        batch, result = results.popleft()
        try:
            scheduler.process_batch_result(batch, result)
        except CollectiveError:  # on a GPU a batch that was launched may have failed since
            return


def _started(scheduler: Any, worker: Any) -> list[tuple[Any, int]]:
    """Unfinished requests outside the queues, each with the number of leading tokens whose KV is whole."""
    failed = scheduler.cur_batch_for_debug
    extending = failed is not None and failed.forward_mode is not None and failed.forward_mode.is_extend()
    unsure = {id(req) for req in failed.reqs} if extending else set()
    if worker.new_batch is not None:
        unsure |= {id(req) for req in worker.new_batch.reqs}
    found: list[tuple[Any, int]] = []
    seen = {id(req) for req in scheduler.waiting_queue}
    for batch in (scheduler.running_batch, scheduler.last_batch, failed, worker.new_batch):
        for req in batch.reqs if batch is not None else ():
            if id(req) not in seen and not req.finished():
                seen.add(id(req))
                found.append((req, 0 if id(req) in unsure else req.seqlen - 1))
    chunked = scheduler.chunked_req
    if chunked is not None and id(chunked) not in seen and not chunked.finished():
        found.append((chunked, 0))
    return found


def _release(scheduler: Any, req: Any, valid: int) -> None:
    from sglang.srt.managers.schedule_batch import release_req

    if not req.kv.holds_kv:
        return
    whole = min(valid, req.kv.kv_committed_len)
    if whole > req.kv.cache_protected_len and not scheduler.disable_radix_cache:
        scheduler.tree_cache.insert_req(req, up_to=whole)
    release_req(
        req=req,
        remaing_req_count=0,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        hisparse_coordinator=scheduler.hisparse_coordinator,
        offload_kv=False,
    )


def answer_counts(scheduler: Any, worker: Any) -> None:
    """A retiring rank died while handing over: say which requests are here, so that the others are sent again."""
    for message in [count for count in worker.counts if count.operation_id in worker.fences]:
        worker.counts.remove(message)
        receive_migrated(worker)
        worker.inbox.forget(message.forget)
        report(scheduler, worker, message.operation_id)


def report(scheduler: Any, worker: Any, operation_id: str) -> None:
    """Tell which requests are here, once everything that was routed here before the recovery has been read."""
    deadline = time.monotonic() + _FENCE_DEADLINE_S
    worker.recovering = True
    while operation_id not in worker.fences and time.monotonic() < deadline:
        read = scheduler.request_receiver._pull_raw_reqs()
        worker.replay += read
        worker.pulled = []
        if not read:
            time.sleep(0.0005)
    receive_migrated(worker)
    rids = {req.rid for req, _ in live_requests(scheduler)}
    for request in worker.replay:
        rids |= {item.rid for item in getattr(request, "batch", [request]) if item.rid is not None}
    rids |= {message.request.rid for message in worker.sent_again}
    for migrated_requests in worker.inbox.held.values():
        rids |= {message.request.rid for message, _, _ in migrated_requests}
    put_fence(scheduler, operation_id, worker.rank)
    worker.agent.post(Recovered(rank=worker.rank, operation_id=operation_id, committed=True, rids=sorted(rids)))
    worker.recovering = False
