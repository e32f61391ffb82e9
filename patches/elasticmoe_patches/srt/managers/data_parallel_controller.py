"""Routing to occupied seats only, and starting seats through the IMM.

Mirrors sglang/srt/managers/data_parallel_controller.py. In SGLang 0.5.21 this process loads no plugins; ours is
started through `entrypoints/engine.py`, which installs these hooks first.
"""

from __future__ import annotations

import json
import pickle
import time
from collections import deque
from typing import Any

import zmq

from elasticmoe_patches.spec import HookSpec, Process
from elasticmoe_sglang.errors import SeatError
from elasticmoe_sglang.imm import messages as imm
from elasticmoe_sglang.imm.client import ImmClient
from elasticmoe_sglang.runtime import current_runtime
from elasticmoe_sglang.seats.messages import decode_command
from elasticmoe_sglang.seats.ticket import SeatTicket, encode_ticket

_DPC: frozenset[Process] = frozenset(("dpc",))
_BOOT_DEADLINE_S = 900.0
# SGLang's Watchdog wants to be fed; an idle controller wakes up this often for it.
_IDLE_POLL_MS = 1000
_BLOCKED_POLL_MS = 10


class WorkerLine:
    """A socket to one seat that never blocks the controller: a dead seat's socket would, for want of a peer.

    What cannot be sent at once waits here; when the seat is given up, the tokenizer sends its requests again.
    """

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._waiting: deque[bytes] = deque()

    def send(self, data: bytes, flags: int = 0) -> None:
        self._waiting.append(data)
        self.flush()

    def send_pyobj(self, obj: Any, flags: int = 0, protocol: int = pickle.HIGHEST_PROTOCOL) -> None:
        self.send(pickle.dumps(obj, protocol))

    def flush(self) -> bool:
        """Send what waits, as far as somebody takes it; whether something still waits."""
        while self._waiting:
            try:
                self._socket.send(self._waiting[0], zmq.NOBLOCK)
            except zmq.Again:
                return True
            self._waiting.popleft()
        return False

    def drop(self) -> None:
        """Nobody will read it there."""
        self._waiting.clear()


def launch_seats(
    self: Any, server_args: Any, port_args: Any, base_gpu_id: int, dp_rank: int | None, worker_ports: list[int]
) -> None:
    """Instead of one process a rank: register every seat's arguments with the IMM and start the first members."""
    from sglang.srt.server_args import PortArgs

    runtime = current_runtime()
    assert runtime is not None
    config = runtime.config
    client = ImmClient(runtime.paths.imm_socket)
    for seat in range(config.max_ep_size):
        seat_ports = PortArgs.init_new(server_args, seat, worker_ports)
        seat_ports.nccl_port = port_args.nccl_port
        seat_ports.instance_id = port_args.instance_id
        client.send(imm.Register(seat=seat, blob=pickle.dumps((server_args, seat_ports, config.device_of(seat)))))
    self.workers = [WorkerLine(worker) for worker in self.workers]
    members = tuple(range(config.ep_size))
    for seat in members:
        ticket = SeatTicket(seat=seat, members=members, epoch=0, joiner=False)
        client.send(imm.Assign(seat=seat, ticket=encode_ticket(ticket)))
    infos = _wait_until_ready(client, members)
    client.close()
    self._active_workers = list(members)
    self._active_count_cache = len(members)
    self.dp_active = [seat in members for seat in range(config.max_ep_size)]
    self.status = list(self.dp_active)
    self.max_total_num_tokens = min(int(info["max_total_num_tokens"]) for info in infos)
    self.max_req_input_len = min(int(info["max_req_input_len"]) for info in infos)
    self.startup_time = infos[0]["startup_time"]


def _wait_until_ready(client: ImmClient, members: tuple[int, ...]) -> list[dict[str, Any]]:
    ready: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + _BOOT_DEADLINE_S
    while len(ready) < len(members):
        message = client.receive(max(0.0, deadline - time.monotonic()))
        if message is None:
            missing = [seat for seat in members if seat not in ready]
            raise SeatError(f"seats {missing} did not start within {_BOOT_DEADLINE_S:.0f} s")
        if isinstance(message, imm.SeatNote):
            ready[message.seat] = json.loads(message.note)
        elif isinstance(message, imm.SeatExited):
            raise SeatError(
                f"the process of seat {message.seat} ended with status {message.status} while starting",
                seat=message.seat,
                hint="Its log above says why",
            )
        elif isinstance(message, imm.Refused):
            raise SeatError(f"the IMM refused: {message.reason}", seat=message.seat)
    return [ready[seat] for seat in members]


def route_to(self: Any, seats: list[int]) -> None:
    """New requests go to these seats only."""
    self.dp_active = [seat in seats for seat in range(self.max_dp_size)]
    self.status = list(self.dp_active)
    self._refresh_active_workers()
    self.round_robin_counter = 0


def _on_command(self: Any, request: Any) -> None:
    """Stop routing to leavers, put the fence behind their last request, and pass the commit on to seat 0."""
    from sglang.srt.managers.io_struct import sock_send

    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq

    command = decode_command(request.command)
    route_to(self, [seat for seat in command.before if seat in command.members])
    for seat in command.leaving:
        sock_send(self.workers[seat], ElasticFenceReq(operation_id=command.operation_id, seat=seat))
    self.send_control_message(request)


def _on_recover_route(self: Any, request: Any) -> None:
    """After a seat's death: what waits for seats that are gone is sent again by the tokenizer."""
    from sglang.srt.managers.io_struct import sock_send

    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq

    for seat, worker in enumerate(self.workers):
        if seat not in request.seats:
            worker.drop()
    route_to(self, request.seats)
    for seat in request.seats:
        sock_send(self.workers[seat], ElasticFenceReq(operation_id=request.operation_id, seat=seat))


def _on_adopt(self: Any, request: Any) -> None:
    """A dead seat's request goes on at the next seat in turn."""
    from sglang.srt.managers.io_struct import sock_send

    active = self._active_workers
    sock_send(self.workers[active[self.round_robin_counter % len(active)]], request)
    self.round_robin_counter = (self.round_robin_counter + 1) % len(active)


def after_init_dispatcher(_result: None, self: Any) -> None:
    from sglang.utils import TypeBasedDispatcher

    from elasticmoe_patches.srt.managers.io_struct import (
        ElasticAdoptReq,
        ElasticCommandReq,
        ElasticRecoverRouteReq,
        ElasticRouteReq,
    )

    self._request_dispatcher += TypeBasedDispatcher(
        [
            (ElasticCommandReq, lambda request: _on_command(self, request)),
            (ElasticRouteReq, lambda request: route_to(self, request.seats)),
            (ElasticRecoverRouteReq, lambda request: _on_recover_route(self, request)),
            (ElasticAdoptReq, lambda request: _on_adopt(self, request)),
        ]
    )


def around_external_routing(original: Any, self: Any, request: Any) -> bool:
    """A request pinned to a seat that is not occupied goes to any other: upstream raises, which ends the server."""
    if request.routed_dp_rank is not None and request.routed_dp_rank not in self._active_workers:
        request.routed_dp_rank = None
    return bool(original(self, request))


def around_dispatch(original: Any, self: Any, method: Any, estimated_tokens: int = 0) -> int | None:
    """The least loaded seat among the occupied ones: an absent seat always looks idle."""
    active = getattr(self, "elasticmoe_active", None)
    if active is None:
        target: int | None = original(self, method, estimated_tokens)
        return target
    idle = float("inf")
    requests, tokens = self.total_requests, self.total_tokens
    self.total_requests = [n if seat in active else idle for seat, n in enumerate(requests)]
    self.total_tokens = [n if seat in active else idle for seat, n in enumerate(tokens)]
    target = original(self, method, estimated_tokens)
    self.total_requests, self.total_tokens = requests, tokens
    if target is not None:
        self.total_requests[target] += 1
        self.total_tokens[target] += estimated_tokens
    return target


def after_refresh_active_workers(_result: None, self: Any) -> None:
    self.dp_budget.elasticmoe_active = frozenset(self._active_workers)


def event_loop(self: Any) -> None:
    """Upstream's loop polls without pause and burns a core; this one sleeps until something arrives."""
    from sglang.srt.managers.io_struct import sock_recv

    poller = zmq.Poller()
    poller.register(self.recv_from_tokenizer, zmq.POLLIN)
    while True:
        self.soft_watchdog.feed()
        blocked = sum(worker.flush() for worker in self.workers)
        poller.poll(_BLOCKED_POLL_MS if blocked else _IDLE_POLL_MS)
        while True:
            try:
                request = sock_recv(self.recv_from_tokenizer, flags=zmq.NOBLOCK)
            except zmq.Again:
                break
            self._request_dispatcher(request)


_CLASS = "sglang.srt.managers.data_parallel_controller.DataParallelController"

HOOKS = (
    HookSpec(
        target=f"{_CLASS}.launch_tensor_parallel_group",
        kind="replace",
        hook=f"{__name__}:launch_seats",
        signature="(self, server_args, port_args, base_gpu_id, dp_rank, worker_ports=None)",
        reason="Seats are forked by the IMM and supervised there; absent seats are registered and not started.",
        expires="SGLang lets a plugin supply the scheduler processes of the controller.",
        processes=_DPC,
    ),
    HookSpec(
        target=f"{_CLASS}.init_dispatcher",
        kind="after",
        hook=f"{__name__}:after_init_dispatcher",
        signature="(self)",
        reason="Handles the commit command (re-route, fence, pass on) and routing updates.",
        expires="SGLang lets plugins register controller messages.",
        processes=_DPC,
    ),
    HookSpec(
        target=f"{_CLASS}.maybe_external_dp_rank_routing",
        kind="around",
        hook=f"{__name__}:around_external_routing",
        signature="(self, req)",
        reason="A request pinned to an absent seat must not end the controller.",
        expires="Upstream answers such a request with an error instead of raising in the controller.",
        processes=_DPC,
    ),
    HookSpec(
        target=f"{_CLASS}._refresh_active_workers",
        kind="after",
        hook=f"{__name__}:after_refresh_active_workers",
        signature="(self)",
        reason="Tells the load budget which seats are occupied.",
        expires="DPBudget knows the active workers.",
        processes=_DPC,
    ),
    HookSpec(
        target="sglang.srt.managers.data_parallel_controller.DPBudget.dispatch",
        kind="around",
        hook=f"{__name__}:around_dispatch",
        signature="(self, method, estimated_tokens=0)",
        reason="Load-based routing picks among occupied seats only.",
        expires="DPBudget knows the active workers.",
        processes=_DPC,
    ),
    HookSpec(
        target=f"{_CLASS}.event_loop",
        kind="replace",
        hook=f"{__name__}:event_loop",
        signature="(self)",
        reason="Waits for messages instead of polling without pause.",
        expires="Upstream's loop blocks.",
        processes=_DPC,
    ),
)
