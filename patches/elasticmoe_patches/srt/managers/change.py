"""A change as one seat's scheduler lives it: the gate, leaving with all requests, taking over a leaver's requests.

Called from the hooks in `scheduler.py`, always at the top of an iteration of the event loop: all members stand there
together, and a joiner enters there.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import Any

import zmq

from elasticmoe_patches.srt.managers.handover import (
    Parcel,
    Progress,
    drain_results,
    fill_from_frames,
    parcels,
    place_kv,
)
from elasticmoe_patches.srt.managers.kv_jobs import fetch
from elasticmoe_sglang.errors import SeatError
from elasticmoe_sglang.hmm.kv_space import KvWindow
from elasticmoe_sglang.seats import messages as sm
from elasticmoe_sglang.seats.kv import chunks_of

logger = logging.getLogger(__name__)

_FENCE_DEADLINE_S = 5.0
_LINGER_MS = 5000
_LOOK_S = 0.01


def open_peer_socket(seat: Any) -> None:
    """Where leavers send their requests."""
    seat.peer_context = zmq.Context(io_threads=1)
    seat.peer = seat.peer_context.socket(zmq.PULL)
    seat.peer.setsockopt(zmq.RCVHWM, 0)
    seat.peer.bind(seat.runtime.paths.peer_endpoint(seat.me))
    seat.idle.watch(seat.peer)


def carry_out(scheduler: Any, seat: Any, command: sm.CommitCommand) -> None:
    """Pass the gate; a leaver that passed it hands over and does not come back.

    Raises:
        SeatLeft: this seat has left.
    """
    scheduler.device_module.synchronize()  # launched kernels read the old table and mask
    if not seat.pass_gate(command):
        return
    if seat.me in command.leaving:
        leave(scheduler, seat, command)


def leave(scheduler: Any, seat: Any, command: sm.CommitCommand) -> None:
    """Hand every request to a survivor, put the fence behind the last output, and end."""
    from elasticmoe_patches.seat import SeatLeft

    started = time.monotonic()
    drain_results(scheduler)
    _read_until_fence(scheduler, seat, command.operation_id)
    survivors = _takers(seat, command)
    load = parcels(scheduler, in_hmm=seat.kv is not None)
    seat.fault_point("leave.sending")
    dealt = {survivor: load[index :: len(survivors)] for index, survivor in enumerate(survivors)}
    _send(seat, command.operation_id, dealt)
    put_fence(scheduler, command.operation_id, seat.me)
    _flush(scheduler)
    seat.fault_point("leave.sent")
    seat.agent.post(
        sm.Left(
            seat=seat.me,
            operation_id=command.operation_id,
            handed={survivor: len(part) for survivor, part in dealt.items()},
            kv_chunks={survivor: _chunks(seat, part) for survivor, part in dealt.items()},
            kv_tokens=sum(parcel.kv_tokens for parcel in load),
            seconds=time.monotonic() - started,
        )
    )
    seat.left = True
    raise SeatLeft


def _takers(seat: Any, command: sm.CommitCommand) -> list[int]:
    """Survivors that take requests over: the living ones. What goes to a dead one is sent again without its KV."""
    survivors = [member for member in command.members if member not in command.joining] or [0]
    return [survivor for survivor in survivors if seat.fabric.control.alive(survivor)] or survivors


def put_fence(scheduler: Any, operation_id: str, seat: int) -> None:
    """Behind all output so far; the tokenizer tells the coordinator when it comes."""
    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq

    scheduler.ipc_channels.send_to_detokenizer.send_output(ElasticFenceReq(operation_id=operation_id, seat=seat), None)


def _read_until_fence(scheduler: Any, seat: Any, operation_id: str) -> None:
    """The controller routes nothing here any more; what it had routed before is still on its way."""
    deadline = time.monotonic() + _FENCE_DEADLINE_S
    while operation_id not in seat.fences:
        receiver = scheduler.request_receiver
        requests = receiver._pull_raw_reqs()
        receiver.unwrap_pickle_wrapper(requests)
        work, _ = receiver._split_work_and_control_reqs(requests)
        scheduler.process_input_requests(work)
        if time.monotonic() > deadline:
            logger.error("seat %d: no fence from the controller within %.0f s; leaving", seat.me, _FENCE_DEADLINE_S)
            return
        if not requests:
            time.sleep(0.0005)


def _chunks(seat: Any, load: list[Parcel]) -> tuple[int, ...]:
    pages = [page for parcel in load for page in parcel.pages]
    return tuple(chunks_of(pages, seat.kv.shape)) if pages else ()


def _send(seat: Any, operation_id: str, dealt: dict[int, list[Parcel]]) -> None:
    """Send each survivor its requests, and how many they are; returns when they are there, or the survivor is dead."""
    from elasticmoe_patches.srt.managers.io_struct import to_wire

    delivering = []
    for survivor, load in dealt.items():
        context = zmq.Context(io_threads=1)
        socket = context.socket(zmq.PUSH)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.connect(seat.runtime.paths.peer_endpoint(survivor))
        for parcel in load:
            header, buffers = parcel.kv or (b"", [])
            frames: list[Any] = [to_wire(_adopt_request(seat, operation_id, parcel)), header, *buffers]
            socket.send_multipart(frames, copy=False)
        socket.send_multipart([b"", str(seat.me).encode(), str(len(load)).encode()])
        socket.close()
        # The context's end waits until all has been delivered, for as long as the socket lingers.
        delivery = threading.Thread(target=context.term, name=f"to seat {survivor}", daemon=True)
        delivery.start()
        delivering.append((survivor, delivery))
    for survivor, delivery in delivering:
        while delivery.is_alive() and seat.fabric.control.alive(survivor):
            delivery.join(_LOOK_S)


def _adopt_request(seat: Any, operation_id: str, parcel: Parcel) -> Any:
    from sglang.srt.managers.io_struct import wrap_as_pickle

    from elasticmoe_patches.srt.managers.io_struct import ElasticAdoptReq

    parcel.request.wrap_pickle_fields()
    return ElasticAdoptReq(
        operation_id=operation_id,
        leaver=seat.me,
        request=parcel.request,
        progress=wrap_as_pickle(parcel.progress),
        kv_tokens=parcel.kv_tokens,
        kv_pages=parcel.pages,
    )


def _flush(scheduler: Any) -> None:
    """Wait until everything this scheduler has sent is with its receivers: the process ends right after."""
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


def take_parcels(seat: Any) -> None:
    """Read what leavers have sent, without waiting."""
    from elasticmoe_patches.srt.managers.io_struct import from_wire

    while seat.peer.poll(0):
        frames = seat.peer.recv_multipart()
        if not frames[0]:
            seat.arrivals.all_sent(int(frames[1]), int(frames[2]))
            continue
        message = from_wire(frames[0])
        seat.arrivals.arrived(message.leaver, (message, frames[1] or None, frames[2:]))


def adopt_ready(scheduler: Any, seat: Any) -> None:
    """Go on with the requests of leavers that have arrived completely and whose last tokens have been delivered, and
    with those of a dead seat that the tokenizer has sent again."""
    sent_again, seat.sent_again = seat.sent_again, []
    for message in sent_again:
        _adopt(scheduler, seat, message, None, [])
    for leaver in seat.arrivals.ready():
        seat.fault_point("adopt.before")
        with_kv, operation_id = 0, ""
        items = seat.arrivals.take(leaver)
        window = seat.arrivals.windows.pop(leaver, None)
        for message, header, buffers in items:
            operation_id = message.operation_id
            with_kv += _adopt(scheduler, seat, message, header, buffers, window)
        adopted = sm.Adopted(
            seat=seat.me, operation_id=operation_id, leaver=leaver, requests=len(items), with_kv=with_kv
        )
        if window is None:
            seat.agent.post(adopted)
        else:
            scheduler.device_module.synchronize()  # the copies are done
            seat.agent.run(partial(_close_window, seat, window, adopted))


def _close_window(seat: Any, window: KvWindow, adopted: sm.Adopted) -> None:
    """Only then may the leaver's memory be given back."""
    window.close()
    seat.agent.post(adopted)


def _adopt(
    scheduler: Any, seat: Any, message: Any, header: bytes | None, buffers: list[bytes], window: KvWindow | None = None
) -> bool:
    from sglang.srt.managers.io_struct import AbortReq, unwrap_from_pickle

    request = message.request
    request.unwrap_pickle_fields()
    progress: Progress = unwrap_from_pickle(message.progress)
    placed = False
    fill = None
    if header is not None:
        fill = fill_from_frames(scheduler, header, buffers)
    elif window is not None and message.kv_pages:
        fill = partial(fetch, seat, scheduler, window.rows(), message.kv_pages)
    if fill is not None:
        try:
            placed = place_kv(scheduler, request, progress.output_ids, message.kv_tokens, fill)
        except Exception:
            # Recomputing is always possible; losing the request is not.
            logger.exception("seat %d could not place the KV of %s; it is recomputed", seat.me, request.rid)
    seat.adopting[request.rid] = progress
    scheduler.handle_generate_request(request)
    if progress.aborted or seat.aborted.reaches(request.rid):
        scheduler.abort_request(AbortReq(rid=request.rid))
    return placed


def check_command(seat: Any, command: sm.CommitCommand) -> None:
    """Raises SeatError when a commit arrives while another one is pending: the coordinator sends one at a time."""
    if seat.pending is not None:
        raise SeatError(
            f"operation {command.operation_id} arrived while {seat.pending.operation_id} is pending", seat=seat.me
        )
