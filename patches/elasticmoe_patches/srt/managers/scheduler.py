"""The scheduler's side of a change (mirrors sglang/srt/managers/scheduler.py). The work is done in `change.py`."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec, Process
from elasticmoe_sglang.seats import messages as sm


def after_init_request_dispatcher(_result: None, self: Any) -> None:
    from sglang.utils import TypeBasedDispatcher

    from elasticmoe_patches.srt.managers.io_struct import ElasticCommandReq

    self._request_dispatcher += TypeBasedDispatcher([(ElasticCommandReq, _on_command)])


def _on_command(request: Any) -> None:
    """Received by all seats in the same iteration; carried out by all at the top of the next one."""
    from elasticmoe_patches.seat import current_seat
    from elasticmoe_patches.srt.managers.change import check_command

    seat = current_seat()
    command = sm.decode_command(request.command)
    check_command(seat, command)
    seat.fault_point("commit.received")
    seat.pending = command


def around_ingest_requests(original: Any, self: Any) -> Any:
    from elasticmoe_patches.seat import current_seat
    from elasticmoe_patches.seat_device import check_collectives
    from elasticmoe_patches.srt.managers.change import adopt_ready, carry_out, take_parcels
    from elasticmoe_patches.srt.managers.kv_jobs import run_kv_jobs
    from elasticmoe_patches.srt.managers.recovery import answer_counts

    seat = current_seat()
    check_collectives(seat)
    if seat.warm_up is not None:
        seat.warm_up.step(self)
        return None
    run_kv_jobs(self, seat)
    take_parcels(seat)
    if seat.pending is not None:
        command, seat.pending = seat.pending, None
        carry_out(self, seat, command)
    adopt_ready(self, seat)
    answer_counts(self, seat)
    seat.new_batch = None
    received = original(self)
    seat.pulled = []
    return received


def around_dispatch_event_loop(original: Any, scheduler: Any) -> None:
    """Booted: a joiner waits here for the commit, at the top of its first iteration. A seat's death ends here too."""
    from elasticmoe_patches.seat import current_seat
    from elasticmoe_patches.srt.managers.recovery import recover
    from elasticmoe_patches.srt.managers.warm_up import warm_up
    from elasticmoe_sglang.errors import CollectiveError, CommitError

    if current_seat().cuda is not None:
        warm_up(original, scheduler, current_seat())
    _enter_service(scheduler)
    while True:
        try:
            original(scheduler)
            return
        except (CollectiveError, CommitError) as error:  # a seat died in a collective, or the leader at the gate
            recover(scheduler, current_seat(), error)


def _enter_service(scheduler: Any) -> None:
    from elasticmoe_patches.plugin import verify_for_process
    from elasticmoe_patches.seat import current_seat
    from elasticmoe_patches.srt.managers.change import open_peer_socket
    from elasticmoe_patches.srt.managers.kv_jobs import announce_first
    from elasticmoe_patches.srt.managers.recovery import report

    verify_for_process("seat")
    seat = current_seat()
    open_peer_socket(seat)
    announce_first(scheduler, seat)
    for socket in (scheduler.ipc_channels.recv_from_tokenizer, scheduler.ipc_channels.recv_from_rpc):
        seat.idle.watch(socket)
    if seat.ticket.joiner:
        seat.join()
        if seat.ticket.attempt:  # in the place of a dead seat
            report(scheduler, seat, seat.ticket.operation_id)
    else:
        seat.serve()


def after_pull_raw_reqs(requests: list[Any] | None, self: Any) -> list[Any] | None:
    """Take out what is for this seat alone (as control messages only seat 0's would be kept), and keep the rest until
    the iteration's input has been dealt with: a seat's death in between must not lose it."""
    from elasticmoe_patches.seat import current_seat
    from elasticmoe_patches.srt.managers.io_struct import ElasticAdoptReq, ElasticFenceReq

    if requests is None:
        return None
    seat = current_seat()
    if seat.replay and not seat.recovering:
        requests, seat.replay = [*seat.replay, *requests], []
    kept = []
    for request in requests:
        if isinstance(request, ElasticFenceReq):
            seat.fences.append(request.operation_id)
        elif isinstance(request, ElasticAdoptReq):
            seat.sent_again.append(request)
        else:
            kept.append(request)
    seat.pulled = list(kept)
    return kept


def after_get_new_batch_prefill(plan: Any, self: Any, running_batch: Any) -> None:
    """Requests of a new batch are in no queue and no batch of the scheduler until it has run."""
    from elasticmoe_patches.seat import current_seat

    current_seat().new_batch = plan.batch_to_run


def around_handle_generate_request(original: Any, self: Any, recv_req: Any, **kwargs: Any) -> None:
    """Remember what the request was built from: a leaver sends it on."""
    from elasticmoe_patches.seat import current_seat
    from elasticmoe_patches.srt.managers.handover import ORIGIN

    seat = current_seat()
    seat.building = recv_req
    try:
        original(self, recv_req, **kwargs)
    finally:
        seat.building = None
    for req in reversed(self.grammar_manager.grammar_queue):
        if req.rid == recv_req.rid:
            setattr(req, ORIGIN, recv_req)
            break


def before_add_request_to_queue(self: Any, req: Any, is_retracted: bool = False) -> None:
    """A moved request gets its progress back before it is scheduled."""
    from elasticmoe_patches.seat import current_seat
    from elasticmoe_patches.srt.managers.handover import ORIGIN

    seat = current_seat()
    if seat.building is not None and seat.building.rid == req.rid:
        setattr(req, ORIGIN, seat.building)
    progress = seat.adopting.pop(req.rid, None)
    if progress is not None:
        progress.apply(req)


def after_abort_request(_result: None, self: Any, recv_req: Any) -> None:
    """A request on its way from a leaver is nowhere to be found now; it is aborted when it arrives."""
    from elasticmoe_patches.seat import current_seat

    current_seat().aborted.add(recv_req.rid, recv_req.abort_all)


def around_process_batch_result(original: Any, self: Any, batch: Any, result: Any) -> None:
    """What a failed collective left is not handed out: on a GPU the failure shows once the batch has run."""
    from elasticmoe_patches.seat import current_seat
    from elasticmoe_patches.seat_device import check_collectives

    seat = current_seat()
    if seat.cuda is not None:
        if getattr(result, "copy_done", None) is not None:
            result.copy_done.synchronize()
        check_collectives(seat)
    original(self, batch, result)
    seat.idle.busy()
    measured = seat.pause.result()
    if measured is not None:
        operation_id, pause_ms, median_ms = measured
        seat.agent.post(sm.Paused(seat=seat.me, operation_id=operation_id, pause_ms=pause_ms, median_ms=median_ms))


def around_on_idle(original: Any, self: Any) -> None:
    """Nothing runs on any seat. One that still has something to wait for must not be held up by sleeping ones."""
    from elasticmoe_patches.seat import current_seat

    seat = current_seat()
    seat.idle.slept = False
    original(self)
    if not seat.idle.slept:
        seat.idle.wake_others()


def sleep_on_idle(self: Any) -> None:
    from elasticmoe_patches.seat import current_seat

    seat = current_seat()
    seat.pause.idle()
    seat.idle.wait()


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_SEAT: frozenset[Process] = frozenset(("seat", "standby"))


def _hook(target: str, kind: Any, function: Any, signature: str, reason: str, expires: str) -> HookSpec:
    return HookSpec(
        target=target,
        kind=kind,
        hook=f"{__name__}:{function.__name__}",
        signature=signature,
        reason=reason,
        expires=expires,
        processes=_SEAT,
    )


HOOKS = (
    _hook(
        f"{_SCHEDULER}.init_request_dispatcher",
        "after",
        after_init_request_dispatcher,
        "(self)",
        "Receives the commit through SGLang's control broadcast, in the same iteration on all seats.",
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
        "Knows the requests of a batch that is being put together when another seat dies.",
        "The scheduler keeps a batch under construction in one of its attributes.",
    ),
    _hook(
        "sglang.srt.managers.scheduler.dispatch_event_loop",
        "around",
        around_dispatch_event_loop,
        "(scheduler)",
        "A joiner waits at the gate before its first iteration; after a seat's death the loop is entered anew.",
        "SGLang offers a hook between initialisation and serving.",
    ),
    _hook(
        "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver._pull_raw_reqs",
        "after",
        after_pull_raw_reqs,
        "(self)",
        "Sees the fence behind the last request that was routed to a leaver.",
        "Control messages can be addressed to one rank.",
    ),
    _hook(
        f"{_SCHEDULER}.handle_generate_request",
        "around",
        around_handle_generate_request,
        "(self, recv_req, *, mm_input_error=None)",
        "Keeps the tokenised request with the request object, so that a leaver can send it on.",
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
        "An abort must also reach a request that is on its way between two seats.",
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
        "A seat that waits for something rings the sleeping ones.",
        "SGLang's own idle sleep works under DP attention.",
    ),
    _hook(
        f"{_SCHEDULER}.maybe_sleep_on_idle",
        "replace",
        sleep_on_idle,
        "(self)",
        "Idle seats sleep instead of going round in lock-step; any of them wakes all.",
        "SGLang's own idle sleep works under DP attention.",
    ),
)
