"""The scheduler's side of a change. The work is done in `worker/`."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.plugin import verify_for_process
from elasticmoe_patches.sampling import own_generator
from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker import first_use
from elasticmoe_patches.worker.commit import accept_command, apply_commit, decode_first, receive_migrated, resume_ready
from elasticmoe_patches.worker.decode_again import decode_again
from elasticmoe_patches.worker.hot import become_hot, park, wait_to_join
from elasticmoe_patches.worker.kv import publish_first_capacity, run_kv_jobs
from elasticmoe_patches.worker.migration import ACCEPTED
from elasticmoe_patches.worker.orders import join_replica, step_together
from elasticmoe_patches.worker.recovery import answer_counts, answer_give_ups, recover, report
from elasticmoe_patches.worker.requests import ORIGIN
from elasticmoe_patches.worker.warm_up import warm_up
from elasticmoe_patches.worker.worker import RankRetired, Worker, current_worker
from elasticmoe_sglang.errors import CollectiveError, CommitError
from elasticmoe_sglang.wire.to_coordinator import Paused

HOOKS = hook = Hooks(__name__, WORKERS)


@hook("replace", "kill_itself_when_parent_died()", expires="SGLang lets a plugin decide whom its schedulers end with.")
def outlive_parent() -> None:
    """A worker's parent is the IMM, which it outlives: it ends with the main process, by the lifeline."""


@hook("after", "Scheduler.init_request_dispatcher(self)", expires="SGLang lets plugins register control messages.")
def after_init_request_dispatcher(_result: None, self: Any) -> None:
    """Receives the commit through SGLang's control broadcast, in the same iteration on all ranks."""
    from sglang.utils import TypeBasedDispatcher

    from elasticmoe_patches.srt.managers.io_struct import ElasticCommandReq

    def accept(request: Any) -> None:
        accept_command(current_worker(), request.command)

    self._request_dispatcher += TypeBasedDispatcher([(ElasticCommandReq, accept)])


@hook(
    "around",
    "Scheduler.ingest_requests(self)",
    also={"0.5.23": "(self, stop_at_pause=False)"},
    expires="SGLang offers a per-iteration hook.",
)
def around_ingest_requests(original: Any, self: Any, **kwargs: Any) -> Any:
    """The top of an iteration: commits are carried out and moved requests taken over here."""
    worker = current_worker()
    worker.check_collectives()
    if worker.warm_up is not None:
        worker.warm_up(self)
        return None
    if worker.replica is None:
        run_kv_jobs(self, worker)
        receive_migrated(worker)
        apply_commit(self, worker)
        resume_ready(self, worker)
        answer_give_ups(self, worker)
    else:
        receive_migrated(worker)
        step_together(self, worker, worker.replica)
        apply_commit(self, worker)
    answer_counts(self, worker)
    worker.iteration.new_batch = None
    received = original(self, **kwargs)
    worker.iteration.pulled = []
    return received


@hook("around", "dispatch_event_loop(scheduler)", expires="SGLang offers a hook between initialisation and serving.")
def around_dispatch_event_loop(original: Any, scheduler: Any) -> None:
    """A joining rank waits at the commit barrier before its first iteration; a failed rank's peers enter it anew.

    So does a rank that has retired when it joins again.
    """
    worker = current_worker()
    if worker.cuda is not None:
        warm_up(original, scheduler, worker)
    verify_for_process("worker")
    publish_first_capacity(scheduler, worker)
    for socket in (scheduler.ipc_channels.recv_from_tokenizer, scheduler.ipc_channels.recv_from_rpc):
        if socket is not None:  # requests come to the rank that leads a replica
            worker.idle.watch(socket)
    if worker.loads is not None:
        first_use.watch(worker, worker.loads)
    worker.listen()
    if worker.join_spec.hot:
        become_hot(scheduler, worker)
        wait_to_join(scheduler, worker)
    _enter_service(scheduler, worker)
    error: CollectiveError | CommitError | None = None
    while True:
        try:
            if error is not None:
                recover(scheduler, worker, error)
            if worker.replica is None and len(worker.mates) > 1:
                join_replica(scheduler, worker)
            original(scheduler)
            worker.stopped = True  # SGLang leaves its event loop only when the server is stopped
            return
        except RankRetired:
            if not worker.parking:
                raise
            park(scheduler, worker)
            wait_to_join(scheduler, worker)
            _enter_service(scheduler, worker)
            error = None
        except (CollectiveError, CommitError) as raised:  # a rank died in a collective, or the leader at the barrier
            if worker.cuda is not None:
                worker.cuda.stop_waiting()  # kernels that wait for the dead rank; to set requests aside waits for them
            error = raised


def _enter_service(scheduler: Any, worker: Worker) -> None:
    own_generator(scheduler.tp_worker.random_seed, worker.mates[0], worker.join_spec.epoch)
    worker.enter_service()
    decode_first(scheduler)
    if worker.join_spec.attempt and worker.leads:  # it replaces a dead rank
        report(scheduler, worker, worker.join_spec.operation_id)


@hook(
    "around",
    "Scheduler.get_new_batch_prefill(self, running_batch)",
    expires="The scheduler keeps a batch under construction in one of its attributes, and resumes a request whose KV "
    "is there without a prefill.",
)
def around_get_new_batch_prefill(original: Any, self: Any, running_batch: Any) -> Any:
    """Requests that come with their KV decode at once. And it knows the requests of a batch that is being put together
    when another rank dies.

    Until it has run they are in no queue and no batch of the scheduler.
    """
    plan = decode_again(self, running_batch, original) or original(self, running_batch)
    current_worker().iteration.new_batch = plan.batch_to_run
    return plan


@hook(
    "around",
    "Scheduler.handle_generate_request(self, recv_req, *, mm_input_error=None)",
    expires="Req keeps what it was built from.",
)
def around_handle_generate_request(original: Any, self: Any, recv_req: Any, **kwargs: Any) -> None:
    """Keeps the tokenised request with the request object, so that a retiring rank can send it on."""
    iteration = current_worker().iteration
    iteration.building = recv_req
    try:
        original(self, recv_req, **kwargs)
    finally:
        iteration.building = None
    for req in reversed(self.grammar_manager.grammar_queue):
        if req.rid == recv_req.rid:
            setattr(req, ORIGIN, recv_req)
            break


@hook(
    "before",
    "Scheduler._add_request_to_queue(self, req, is_retracted=False)",
    expires="SGLang can resume a request from serialised progress.",
)
def before_add_request_to_queue(self: Any, req: Any, is_retracted: bool = False) -> None:
    """Restores a moved request's progress after SGLang has built it and before it is scheduled."""
    worker = current_worker()
    building = worker.iteration.building
    if building is not None and building.rid == req.rid:
        setattr(req, ORIGIN, building)
    progress = worker.inbox.resuming.pop(req.rid, None)
    if progress is not None:
        progress.apply(req)
        setattr(req, ACCEPTED, True)
        if progress.sent_again and req.output_ids:
            self.batch_result_processor._maybe_update_reasoning_tokens(req, list(req.output_ids))


@hook(
    "around",
    "Scheduler._abort_on_queued_limit(self, recv_req)",
    expires="SGLang counts only requests that arrive.",
)
def around_queued_limit(original: Any, self: Any, recv_req: Any) -> bool:
    """--max-queued-requests refuses requests that arrive.

    One that was accepted before, here or by another rank, and comes back into the queue waits however full it is.
    """
    if getattr(recv_req, ACCEPTED, False):
        return False
    refused = bool(original(self, recv_req))
    if not refused:
        setattr(recv_req, ACCEPTED, True)
    return refused


@hook("after", "Scheduler.abort_request(self, recv_req)", expires="SGLang can move requests between ranks itself.")
def after_abort_request(_result: None, self: Any, recv_req: Any) -> None:
    """An abort must also reach a request that is on its way between two ranks.

    It is in no scheduler now, and is aborted when it arrives.
    """
    current_worker().inbox.aborted.add(recv_req.rid, recv_req.abort_all)


@hook(
    "around",
    "Scheduler.process_batch_result(self, batch, result)",
    expires="SGLang lets a distributed backend fail a batch.",
)
def around_process_batch_result(original: Any, self: Any, batch: Any, result: Any) -> None:
    """Hands out no tokens of a batch whose collectives failed; measures the pause around a commit.

    On a GPU the failure shows only once the batch has run.
    """
    worker = current_worker()
    if worker.cuda is not None:
        if getattr(result, "copy_done", None) is not None:
            result.copy_done.synchronize()
        worker.check_collectives()
    original(self, batch, result)
    worker.idle.busy()
    measured = worker.pause.result()
    if measured is not None:
        operation_id, pause_ms = measured
        worker.agent.post(Paused(rank=worker.rank, operation_id=operation_id, pause_ms=pause_ms))


@hook("around", "Scheduler.on_idle(self)", expires="SGLang's own idle sleep works under DP attention.")
def around_on_idle(original: Any, self: Any) -> None:
    """A rank that waits for something rings the sleeping ones.

    Nothing runs on any rank then; one that still waits for something must not wait for the others' sleep to end.
    """
    worker = current_worker()
    worker.idle.slept = False
    original(self)
    if not worker.idle.slept:
        worker.idle.wake_others()


@hook("replace", "Scheduler.maybe_sleep_on_idle(self)", expires="SGLang's own idle sleep works under DP attention.")
def sleep_on_idle(self: Any) -> None:
    """Idle ranks sleep instead of going round in lock-step; any of them wakes all."""
    worker = current_worker()
    worker.pause.idle()
    worker.idle.wait()
