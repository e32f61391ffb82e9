"""Routing to active ranks only, and starting ranks through the IMM.

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
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.imm.client import ImmClient
from elasticmoe_sglang.runtime import current_runtime
from elasticmoe_sglang.wire import to_imm as imm
from elasticmoe_sglang.wire.join_spec import JoinSpec, encode_join_spec
from elasticmoe_sglang.wire.to_worker import decode_command

_DPC: frozenset[Process] = frozenset(("dpc",))
_BOOT_DEADLINE_S = 900.0
# SGLang's Watchdog wants to be fed; an idle controller wakes up this often for it.
_IDLE_POLL_MS = 1000
_BLOCKED_POLL_MS = 10


class WorkerLine:
    """A socket to one rank that never blocks the controller: a dead rank's socket would, for want of a peer.

    What cannot be sent at once waits here; when the rank is given up, the tokenizer sends its requests again.
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


def launch_workers(
    self: Any, server_args: Any, port_args: Any, base_gpu_id: int, dp_rank: int | None, worker_ports: list[int]
) -> None:
    """Instead of one process a rank: register every rank's arguments with the IMM and start the first members."""
    from sglang.srt.server_args import PortArgs

    from elasticmoe_patches.plugin import report_hooks

    report_hooks("dpc")
    runtime = current_runtime()
    assert runtime is not None
    config = runtime.config
    client = ImmClient(runtime.paths.imm_socket)
    for rank in range(config.max_ep_size):
        rank_ports = PortArgs.init_new(server_args, rank, worker_ports)
        rank_ports.nccl_port = port_args.nccl_port
        rank_ports.instance_id = port_args.instance_id
        client.send(imm.Register(rank=rank, blob=pickle.dumps((server_args, rank_ports, config.device_of(rank)))))
    self.workers = [WorkerLine(worker) for worker in self.workers]
    members = tuple(range(config.ep_size))
    for rank in members:
        join_spec = JoinSpec(rank=rank, members=members, epoch=0, joining_rank=False)
        client.send(imm.Assign(rank=rank, join_spec=encode_join_spec(join_spec)))
    infos = _wait_until_ready(client, members)
    client.close()
    self._active_workers = list(members)
    self._active_count_cache = len(members)
    self.dp_active = [rank in members for rank in range(config.max_ep_size)]
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
            missing = [rank for rank in members if rank not in ready]
            raise WorkerError(f"ranks {missing} did not start within {_BOOT_DEADLINE_S:.0f} s")
        if isinstance(message, imm.WorkerNote):
            ready[message.rank] = json.loads(message.note)
        elif isinstance(message, imm.WorkerExited):
            raise WorkerError(
                f"the process of rank {message.rank} ended with status {message.status} while starting",
                rank=message.rank,
                hint="Its log above says why",
            )
        elif isinstance(message, imm.Refused):
            raise WorkerError(f"the IMM refused: {message.reason}", rank=message.rank)
    return [ready[rank] for rank in members]


def route_to(self: Any, ranks: list[int]) -> None:
    """New requests go to these ranks only."""
    self.dp_active = [rank in ranks for rank in range(self.max_dp_size)]
    self.status = list(self.dp_active)
    self._refresh_active_workers()
    self.round_robin_counter = 0


def _on_command(self: Any, request: Any) -> None:
    """Stop routing to retiring ranks, put the fence behind their last request, and pass the commit on to rank 0."""
    from sglang.srt.managers.io_struct import sock_send

    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq

    command = decode_command(request.command)
    route_to(self, [rank for rank in command.before if rank in command.members])
    for rank in command.retiring:
        sock_send(self.workers[rank], ElasticFenceReq(operation_id=command.operation_id, rank=rank))
    self.send_control_message(request)


def _on_recover_route(self: Any, request: Any) -> None:
    """After a rank's death: what waits for ranks that are gone is sent again by the tokenizer."""
    from sglang.srt.managers.io_struct import sock_send

    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq

    for rank, worker in enumerate(self.workers):
        if rank not in request.ranks:
            worker.drop()
    route_to(self, request.ranks)
    for rank in request.ranks:
        sock_send(self.workers[rank], ElasticFenceReq(operation_id=request.operation_id, rank=rank))


def _on_resume(self: Any, request: Any) -> None:
    """A dead rank's request goes on at the next rank in turn."""
    from sglang.srt.managers.io_struct import sock_send

    active = self._active_workers
    sock_send(self.workers[active[self.round_robin_counter % len(active)]], request)
    self.round_robin_counter = (self.round_robin_counter + 1) % len(active)


def after_init_dispatcher(_result: None, self: Any) -> None:
    from sglang.utils import TypeBasedDispatcher

    from elasticmoe_patches.srt.managers.io_struct import (
        ElasticCommandReq,
        ElasticRecoverRouteReq,
        ElasticResumeReq,
        ElasticRouteReq,
    )

    self._request_dispatcher += TypeBasedDispatcher(
        [
            (ElasticCommandReq, lambda request: _on_command(self, request)),
            (ElasticRouteReq, lambda request: route_to(self, request.ranks)),
            (ElasticRecoverRouteReq, lambda request: _on_recover_route(self, request)),
            (ElasticResumeReq, lambda request: _on_resume(self, request)),
        ]
    )


def around_external_routing(original: Any, self: Any, request: Any) -> bool:
    """A request pinned to a rank that is not active goes to any other: upstream raises, which ends the server."""
    if request.routed_dp_rank is not None and request.routed_dp_rank not in self._active_workers:
        request.routed_dp_rank = None
    return bool(original(self, request))


def around_dispatch(original: Any, self: Any, method: Any, estimated_tokens: int = 0) -> int | None:
    """The least loaded rank among the active ones: an inactive rank always looks idle."""
    active = getattr(self, "elasticmoe_active", None)
    if active is None:
        target: int | None = original(self, method, estimated_tokens)
        return target
    idle = float("inf")
    requests, tokens = self.total_requests, self.total_tokens
    self.total_requests = [n if rank in active else idle for rank, n in enumerate(requests)]
    self.total_tokens = [n if rank in active else idle for rank, n in enumerate(tokens)]
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
        hook=f"{__name__}:launch_workers",
        signature="(self, server_args, port_args, base_gpu_id, dp_rank, worker_ports=None)",
        reason="Ranks are forked by the IMM and supervised there; inactive ranks are registered and not started.",
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
        reason="A request pinned to an inactive rank must not end the controller.",
        expires="Upstream answers such a request with an error instead of raising in the controller.",
        processes=_DPC,
    ),
    HookSpec(
        target=f"{_CLASS}._refresh_active_workers",
        kind="after",
        hook=f"{__name__}:after_refresh_active_workers",
        signature="(self)",
        reason="Tells the load budget which ranks are active.",
        expires="DPBudget knows the active workers.",
        processes=_DPC,
    ),
    HookSpec(
        target="sglang.srt.managers.data_parallel_controller.DPBudget.dispatch",
        kind="around",
        hook=f"{__name__}:around_dispatch",
        signature="(self, method, estimated_tokens=0)",
        reason="Load-based routing picks among active ranks only.",
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
