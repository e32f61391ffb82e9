"""The scheduler's side of a change (mirrors sglang/srt/managers/scheduler.py). The work is done in `change.py`."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec, Process
from elasticmoe_sglang.wire import to_worker as sm


def after_init_request_dispatcher(_result: None, self: Any) -> None:
    from sglang.utils import TypeBasedDispatcher

    from elasticmoe_patches.srt.managers.io_struct import ElasticCommandReq

    self._request_dispatcher += TypeBasedDispatcher([(ElasticCommandReq, _on_command)])


def _on_command(request: Any) -> None:
    """Received by all ranks in the same iteration; carried out by all at the top of the next one."""
    from elasticmoe_patches.worker.commit import check_command
    from elasticmoe_patches.worker.worker import current_worker

    worker = current_worker()
    command = sm.decode_command(request.command)
    check_command(worker, command)
    worker.fault_point("commit.received")
    worker.pending = command


def around_ingest_requests(original: Any, self: Any) -> Any:
    from elasticmoe_patches.worker.commit import apply_commit, receive_migrated, resume_ready
    from elasticmoe_patches.worker.device import check_collectives
    from elasticmoe_patches.worker.kv_jobs import run_kv_jobs
    from elasticmoe_patches.worker.recovery import answer_counts
    from elasticmoe_patches.worker.worker import current_worker

    worker = current_worker()
    check_collectives(worker)
    if worker.warm_up is not None:
        worker.warm_up.step(self)
        return None
    run_kv_jobs(self, worker)
    receive_migrated(worker)
    if worker.pending is not None:
        command, worker.pending = worker.pending, None
        apply_commit(self, worker, command)
    resume_ready(self, worker)
    answer_counts(self, worker)
    worker.new_batch = None
    received = original(self)
    worker.pulled = []
    return received


def around_dispatch_event_loop(original: Any, scheduler: Any) -> None:
    """Booted: a joining rank waits here for the commit, at the top of its first iteration. A rank's death ends here
    too."""
    from elasticmoe_patches.worker.recovery import recover
    from elasticmoe_patches.worker.warm_up import warm_up
    from elasticmoe_patches.worker.worker import current_worker
    from elasticmoe_sglang.errors import CollectiveError, CommitError

    if current_worker().cuda is not None:
        warm_up(original, scheduler, current_worker())
    _enter_service(scheduler)
    while True:
        try:
            original(scheduler)
            current_worker().left = True  # SGLang ends its event loop only when the server is stopped
            return
        except (
            CollectiveError,
            CommitError,
        ) as error:  # a rank died in a collective, or the leader at the commit barrier
            recover(scheduler, current_worker(), error)


def _enter_service(scheduler: Any) -> None:
    from elasticmoe_patches.plugin import verify_for_process
    from elasticmoe_patches.worker.commit import open_peer_socket
    from elasticmoe_patches.worker.kv_jobs import announce_first
    from elasticmoe_patches.worker.recovery import report
    from elasticmoe_patches.worker.worker import current_worker

    verify_for_process("rank")
    worker = current_worker()
    open_peer_socket(worker)
    announce_first(scheduler, worker)
    for socket in (scheduler.ipc_channels.recv_from_tokenizer, scheduler.ipc_channels.recv_from_rpc):
        worker.idle.watch(socket)
    if worker.join_spec.joining_rank:
        worker.join()
        if worker.join_spec.attempt:  # in the place of a dead rank
            report(scheduler, worker, worker.join_spec.operation_id)
    else:
        worker.serve()


def after_pull_raw_reqs(requests: list[Any] | None, self: Any) -> list[Any] | None:
    """Take out what is for this rank alone (as control messages only rank 0's would be kept), and keep the rest until
    the iteration's input has been dealt with: a rank's death in between must not lose it."""
    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq, ElasticResumeReq
    from elasticmoe_patches.worker.worker import current_worker

    if requests is None:
        return None
    worker = current_worker()
    if worker.replay and not worker.recovering:
        requests, worker.replay = [*worker.replay, *requests], []
    kept = []
    for request in requests:
        if isinstance(request, ElasticFenceReq):
            worker.fences.append(request.operation_id)
        elif isinstance(request, ElasticResumeReq):
            worker.sent_again.append(request)
        else:
            kept.append(request)
    worker.pulled = list(kept)
    return kept


def after_get_new_batch_prefill(plan: Any, self: Any, running_batch: Any) -> None:
    """Requests of a new batch are in no queue and no batch of the scheduler until it has run."""
    from elasticmoe_patches.worker.worker import current_worker

    current_worker().new_batch = plan.batch_to_run


def around_handle_generate_request(original: Any, self: Any, recv_req: Any, **kwargs: Any) -> None:
    """Remember what the request was built from: a retiring rank sends it on."""
    from elasticmoe_patches.worker.migration import ORIGIN
    from elasticmoe_patches.worker.worker import current_worker

    worker = current_worker()
    worker.building = recv_req
    try:
        original(self, recv_req, **kwargs)
    finally:
        worker.building = None
    for req in reversed(self.grammar_manager.grammar_queue):
        if req.rid == recv_req.rid:
            setattr(req, ORIGIN, recv_req)
            break


def before_add_request_to_queue(self: Any, req: Any, is_retracted: bool = False) -> None:
    """A moved request gets its progress back before it is scheduled."""
    from elasticmoe_patches.worker.migration import ORIGIN
    from elasticmoe_patches.worker.worker import current_worker

    worker = current_worker()
    if worker.building is not None and worker.building.rid == req.rid:
        setattr(req, ORIGIN, worker.building)
    progress = worker.resuming.pop(req.rid, None)
    if progress is not None:
        progress.apply(req)


def after_abort_request(_result: None, self: Any, recv_req: Any) -> None:
    """A request on its way from a retiring rank is nowhere to be found now; it is aborted when it arrives."""
    from elasticmoe_patches.worker.worker import current_worker

    current_worker().aborted.add(recv_req.rid, recv_req.abort_all)


def around_process_batch_result(original: Any, self: Any, batch: Any, result: Any) -> None:
    """What a failed collective left is not handed out: on a GPU the failure shows once the batch has run."""
    from elasticmoe_patches.worker.device import check_collectives
    from elasticmoe_patches.worker.worker import current_worker

    worker = current_worker()
    if worker.cuda is not None:
        if getattr(result, "copy_done", None) is not None:
            result.copy_done.synchronize()
        check_collectives(worker)
    original(self, batch, result)
    worker.idle.busy()
    measured = worker.pause.result()
    if measured is not None:
        operation_id, pause_ms, median_ms = measured
        worker.agent.post(
            sm.Paused(rank=worker.rank, operation_id=operation_id, pause_ms=pause_ms, median_ms=median_ms)
        )


def around_on_idle(original: Any, self: Any) -> None:
    """Nothing runs on any rank. One that still has something to wait for must not be held up by sleeping ones."""
    from elasticmoe_patches.worker.worker import current_worker

    worker = current_worker()
    worker.idle.slept = False
    original(self)
    if not worker.idle.slept:
        worker.idle.wake_others()


def sleep_on_idle(self: Any) -> None:
    from elasticmoe_patches.worker.worker import current_worker

    worker = current_worker()
    worker.pause.idle()
    worker.idle.wait()


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_RANK: frozenset[Process] = frozenset(("rank", "standby"))


def _hook(target: str, kind: Any, function: Any, signature: str, reason: str, expires: str) -> HookSpec:
    return HookSpec(
        target=target,
        kind=kind,
        hook=f"{__name__}:{function.__name__}",
        signature=signature,
        reason=reason,
        expires=expires,
        processes=_RANK,
    )


HOOKS = (
    _hook(
        f"{_SCHEDULER}.init_request_dispatcher",
        "after",
        after_init_request_dispatcher,
        "(self)",
        "Receives the commit through SGLang's control broadcast, in the same iteration on all ranks.",
        "SGLang lets plugins register control messages.",
    ),
    _hook(
        f"{_SCHEDULER}.ingest_requests",
        "around",
        around_ingest_requests,
        "(self)",
        "The top of an iteration: commits are carried out and moved requests taken over here.",
        "SGLang offers a per-iteration hook.",
    ),
    _hook(
        f"{_SCHEDULER}.get_new_batch_prefill",
        "after",
        after_get_new_batch_prefill,
        "(self, running_batch)",
        "Knows the requests of a batch that is being put together when another rank dies.",
        "The scheduler keeps a batch under construction in one of its attributes.",
    ),
    _hook(
        "sglang.srt.managers.scheduler.dispatch_event_loop",
        "around",
        around_dispatch_event_loop,
        "(scheduler)",
        "A joining rank waits at the commit barrier before its first iteration; a failed rank's peers enter it anew.",
        "SGLang offers a hook between initialisation and serving.",
    ),
    _hook(
        "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver._pull_raw_reqs",
        "after",
        after_pull_raw_reqs,
        "(self)",
        "Sees the fence behind the last request that was routed to a retiring rank.",
        "Control messages can be addressed to one rank.",
    ),
    _hook(
        f"{_SCHEDULER}.handle_generate_request",
        "around",
        around_handle_generate_request,
        "(self, recv_req, *, mm_input_error=None)",
        "Keeps the tokenised request with the request object, so that a retiring rank can send it on.",
        "Req keeps what it was built from.",
    ),
    _hook(
        f"{_SCHEDULER}._add_request_to_queue",
        "before",
        before_add_request_to_queue,
        "(self, req, is_retracted=False)",
        "Restores a moved request's progress after SGLang has built it and before it is scheduled.",
        "SGLang can resume a request from serialised progress.",
    ),
    _hook(
        f"{_SCHEDULER}.abort_request",
        "after",
        after_abort_request,
        "(self, recv_req)",
        "An abort must also reach a request that is on its way between two ranks.",
        "SGLang can move requests between ranks itself.",
    ),
    _hook(
        f"{_SCHEDULER}.process_batch_result",
        "around",
        around_process_batch_result,
        "(self, batch, result)",
        "Hands out no tokens of a batch whose collectives failed; measures the pause around a commit.",
        "SGLang lets a distributed backend fail a batch.",
    ),
    _hook(
        f"{_SCHEDULER}.on_idle",
        "around",
        around_on_idle,
        "(self)",
        "A rank that waits for something rings the sleeping ones.",
        "SGLang's own idle sleep works under DP attention.",
    ),
    _hook(
        f"{_SCHEDULER}.maybe_sleep_on_idle",
        "replace",
        sleep_on_idle,
        "(self)",
        "Idle ranks sleep instead of going round in lock-step; any of them wakes all.",
        "SGLang's own idle sleep works under DP attention.",
    ),
)
