"""A change in one rank's scheduler: the commit, retiring with all requests, resuming a retiring rank's requests.

Called from the hooks in `scheduler.py`, always at the top of an iteration of the event loop: all members reach it
together, and a joining rank begins there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import zmq

from elasticmoe_patches.worker.inbox import RetirementKey
from elasticmoe_patches.worker.migration import (
    MigratedRequest,
    Progress,
    fill_from_window,
    migrated_requests,
    place_kv,
)
from elasticmoe_patches.worker.requests import ahead_of_new_ones, drain_results
from elasticmoe_patches.worker.worker import RankRetired, Worker
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.hmm.kv_space import KvWindow
from elasticmoe_sglang.wire.to_coordinator import Retired
from elasticmoe_sglang.wire.to_worker import CommitCommand, Resumed
from elasticmoe_sglang.worker.kv import chunks_of

if TYPE_CHECKING:
    from elasticmoe_patches.srt.managers.io_struct import ElasticResumeReq

logger = logging.getLogger(__name__)

_FENCE_DEADLINE_S = 5.0
_LINGER_MS = 5000
_LOOK_S = 0.01


def accept_command(worker: Worker, command: CommitCommand) -> None:
    """Keep a commit for the top of the next iteration.

    Raises:
        WorkerError: another one is pending: the coordinator sends one at a time.
    """
    if worker.pending is not None:
        raise WorkerError(
            f"operation {command.operation_id} arrived while {worker.pending.operation_id} is pending", rank=worker.rank
        )
    worker.fault_point("commit.received")
    worker.pending = command


def apply_commit(scheduler: Any, worker: Worker) -> None:
    """Carry out the pending commit; a retiring rank migrates its requests and does not return.

    Raises:
        RankRetired: this rank has retired.
    """
    command, worker.pending = worker.pending, None
    if command is None:
        return
    scheduler.device_module.synchronize()  # launched kernels read the old table and mask
    if not worker.commit(command):
        return
    if worker.rank in command.retiring:
        _retire(scheduler, worker, command)
    decode_first(scheduler)


def decode_first(scheduler: Any) -> None:
    """The first step after a commit computes no prompt: running streams have already waited for the commit."""
    scheduler._prefill_decode_interval_remaining = max(1, scheduler._prefill_decode_interval_remaining)


def _retire(scheduler: Any, worker: Worker, command: CommitCommand) -> None:
    """Send every request to a survivor and the fence behind the last output, and leave the event loop."""
    drain_results(scheduler)
    if not worker.leads:
        # Whoever leads the replica sends its requests. Each rank of another one copies its part of their KV from the
        # HMM's memory, where it stays when this process has ended.
        raise RankRetired
    _read_until_fence(scheduler, worker, command.operation_id)
    _resume_sent_again(scheduler, worker)  # it may have come with the fence, and goes on from here with the others
    survivors = _receivers(worker, command)
    load = migrated_requests(scheduler)
    worker.fault_point("retire.sending")
    dealt = {survivor: load[index :: len(survivors)] for index, survivor in enumerate(survivors)}
    _send(worker, command.operation_id, dealt)
    send_fence(scheduler, command.operation_id, worker.rank)
    if not worker.parking:
        _flush(scheduler)
    worker.fault_point("retire.sent")
    worker.agent.post(
        Retired(
            rank=worker.rank,
            operation_id=command.operation_id,
            migrated={survivor: len(part) for survivor, part in dealt.items()},
            kv_chunks={survivor: _chunks(worker, part) for survivor, part in dealt.items()},
            kv_tokens=sum(migrated.kv_tokens for migrated in load),
        )
    )
    raise RankRetired


def _receivers(worker: Worker, command: CommitCommand) -> list[int]:
    """Survivors that get requests: the living ones (of a replica the rank that leads it). What a dead one gets is sent
    again without its KV."""
    config, control = worker.runtime.config, worker.region.control
    survivors = [m for m in config.leaders_of(command.members) if m not in command.joining] or [0]
    return [survivor for survivor in survivors if all(map(control.alive, config.mates_of(survivor)))] or survivors


def send_fence(scheduler: Any, operation_id: str, rank: int) -> None:
    """Behind all output so far; the tokenizer tells the coordinator when it arrives."""
    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq

    scheduler.ipc_channels.send_to_detokenizer.send_output(ElasticFenceReq(operation_id=operation_id, rank=rank), None)


def _read_until_fence(scheduler: Any, worker: Worker, operation_id: str) -> None:
    """The controller routes nothing here any more; what it routed before is still in the socket."""
    deadline = time.monotonic() + _FENCE_DEADLINE_S
    while operation_id not in worker.fences:
        receiver = scheduler.request_receiver
        requests = receiver._pull_raw_reqs()
        receiver.unwrap_pickle_wrapper(requests)
        work, _ = receiver._split_work_and_control_reqs(requests)
        scheduler.process_input_requests(work)
        if time.monotonic() > deadline:
            logger.error(
                "rank %d: no fence from the controller within %.0f s; retiring without it",
                worker.rank,
                _FENCE_DEADLINE_S,
            )
            return
        if not requests:
            time.sleep(0.0005)


def _chunks(worker: Worker, load: list[MigratedRequest]) -> tuple[int, ...]:
    pages = [page for migrated in load for page in migrated.pages]
    return tuple(chunks_of(pages, worker.kv.shape)) if pages and worker.kv is not None else ()


def _send(worker: Worker, operation_id: str, dealt: dict[int, list[MigratedRequest]]) -> None:
    """Send each survivor its requests and their number; returns once they are delivered, or the survivor is dead."""
    from elasticmoe_patches.srt.managers.io_struct import to_wire

    delivering = []
    for survivor, load in dealt.items():
        context = zmq.Context(io_threads=1)
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(worker.runtime.paths.peer_endpoint(survivor))
        for migrated in load:
            socket.send(to_wire(_resume_request(worker, operation_id, migrated)), copy=False)
        socket.send_multipart([b"", operation_id.encode(), str(worker.rank).encode(), str(len(load)).encode()])
        socket.close()
        # Terminating the context waits until all has been delivered, for as long as the socket lingers.
        delivery = threading.Thread(target=context.term, name=f"to rank {survivor}", daemon=True)
        delivery.start()
        delivering.append((survivor, delivery))
    for survivor, delivery in delivering:
        while delivery.is_alive() and worker.region.control.alive(survivor):
            delivery.join(_LOOK_S)


def _resume_request(worker: Worker, operation_id: str, migrated: MigratedRequest) -> Any:
    from sglang.srt.managers.io_struct import wrap_as_pickle

    from elasticmoe_patches.srt.managers.io_struct import ElasticResumeReq

    migrated.request.wrap_pickle_fields()
    return ElasticResumeReq(
        operation_id=operation_id,
        retiring_rank=worker.rank,
        request=migrated.request,
        progress=wrap_as_pickle(migrated.progress),
        kv_tokens=migrated.kv_tokens,
        kv_pages=migrated.pages,
    )


def _flush(scheduler: Any) -> None:
    """Wait until everything this scheduler has sent is delivered: the process ends right after."""
    channels = scheduler.ipc_channels
    contexts = set()
    senders = (channels.send_to_detokenizer.socket, channels.send_to_tokenizer.socket)
    for socket in (
        *senders,
        channels.recv_from_tokenizer,
        channels.recv_from_rpc,
        channels.send_metrics_from_scheduler,
    ):
        if socket is not None:
            contexts.add(socket.context)
            socket.close(linger=_LINGER_MS)
    for context in contexts:
        context.term()


def receive_migrated(worker: Worker) -> None:
    """Read what retiring ranks have sent, without blocking."""
    from elasticmoe_patches.srt.managers.io_struct import from_wire

    while int(worker.peer.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # `poll` takes ten times as long
        frames = worker.peer.recv_multipart()
        if not frames[0]:
            worker.inbox.all_sent(frames[1].decode(), int(frames[2]), int(frames[3]))
            continue
        message = from_wire(frames[0])
        worker.inbox.arrived(message.operation_id, message.retiring_rank, message)


def resume_ready(scheduler: Any, worker: Worker) -> None:
    """Resume the requests of retiring ranks that have all arrived and whose last tokens have been delivered, and those
    of a dead or a full rank that the tokenizer has sent again."""
    _resume_sent_again(scheduler, worker)
    for operation_id, rank, retirement in worker.inbox.take_ready():
        resume_retirement(scheduler, worker, (operation_id, rank), retirement.held, retirement.window)


def resume_retirement(
    scheduler: Any,
    worker: Worker,
    key: RetirementKey,
    migrated: Sequence[ElasticResumeReq],
    window: KvWindow | None,
    *,
    with_kv: bool = True,
    aborted: Collection[str] | None = None,
) -> None:
    """Resume the requests of a retiring rank here, and tell the coordinator.

    Args:
        migrated: ElasticResumeReq of each.
        window: the retiring rank's KV memory, where it could be mapped; it is closed.
        with_kv: False: the KV is recomputed all the same, since another rank of the replica has no window.
        aborted: as for `resume`.
    """
    worker.fault_point("resume.before")
    source = window if with_kv else None
    placed = sum(resume(scheduler, worker, message, source, aborted=_said(aborted, message)) for message in migrated)
    had_kv = sum(message.kv_tokens >= scheduler.page_size for message in migrated)  # only whole pages are kept
    operation_id, retiring_rank = key
    resumed = Resumed(
        rank=worker.rank,
        operation_id=operation_id,
        retiring_rank=retiring_rank,
        requests=len(migrated),
        with_kv=placed,
        recomputed=had_kv - placed,
    )
    if window is None:
        worker.agent.post(resumed)
    else:
        scheduler.device_module.synchronize()  # the copies are done
        worker.agent.run(partial(_close_window, worker, window, resumed))


def _said(aborted: Collection[str] | None, message: Any) -> bool | None:
    return None if aborted is None else message.request.rid in aborted


def _resume_sent_again(scheduler: Any, worker: Worker) -> None:
    sent_again, worker.recovery.sent_again = worker.recovery.sent_again, []
    for message in sent_again:
        resume(scheduler, worker, message)


def _close_window(worker: Worker, window: KvWindow, resumed: Resumed) -> None:
    """The retiring rank's memory may be given back once `resumed` is sent."""
    window.close()
    worker.agent.post(resumed)


def resume(
    scheduler: Any, worker: Worker, message: Any, window: KvWindow | None = None, *, aborted: bool | None = None
) -> bool:
    """Give the request to SGLang; whether its KV could be placed.

    Args:
        message: ElasticResumeReq. window: of the retiring rank, to copy the KV from.
        aborted: on its way here; None: as this rank has heard.
    """
    from sglang.srt.managers.io_struct import AbortReq, unwrap_from_pickle

    request = message.request
    request.unwrap_pickle_fields()
    progress: Progress = unwrap_from_pickle(message.progress)
    placed = False
    if window is not None and worker.kv is not None and message.kv_pages:
        fill = fill_from_window(scheduler, worker.kv.rows, window.rows(), message.kv_pages)
        try:
            placed = place_kv(scheduler, request, progress.output_ids, message.kv_tokens, fill)
        except Exception:
            # Recomputing is always possible; losing the request is not.
            logger.exception("rank %d could not place the KV of %s; it is recomputed", worker.rank, request.rid)
    worker.inbox.resuming[request.rid] = progress
    scheduler.handle_generate_request(request)
    ahead_of_new_ones(scheduler, request.rid, with_kv=placed)
    reached = worker.inbox.aborted.reaches(request.rid) if aborted is None else aborted
    if progress.aborted or reached:
        scheduler.abort_request(AbortReq(rid=request.rid))
    return placed
