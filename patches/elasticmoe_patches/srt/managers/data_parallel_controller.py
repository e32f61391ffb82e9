"""Routing to active ranks only, and starting ranks through the IMM.

In SGLang 0.5.21 this process loads no plugins; ours is started by `entrypoints/engine.py`, which installs these hooks
first.
"""

from __future__ import annotations

import json
import pickle
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

import zmq

from elasticmoe_patches.spec import DPC, Hooks
from elasticmoe_patches.versions import api
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.imm.client import ImmClient
from elasticmoe_sglang.runtime import current_runtime, only_this_user
from elasticmoe_sglang.wire.to_coordinator import WorkerExited, WorkerNote
from elasticmoe_sglang.wire.to_imm import Assign, Refused, Register
from elasticmoe_sglang.wire.to_worker import JoinSpec

HOOKS = hook = Hooks(__name__, DPC)

_BOOT_DEADLINE_S = 900.0
# SGLang's Watchdog wants to be fed; an idle controller wakes up this often for it.
_IDLE_POLL_MS = 1000
_BLOCKED_POLL_MS = 10


class WorkerLine:
    """A socket to one rank that never blocks the controller: a dead rank's socket would, having no peer.

    What cannot be sent at once is queued here; when the rank is given up, the tokenizer sends its requests again.
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
        """Send what is queued, as far as the peer accepts it; whether something is left."""
        while self._waiting:
            try:
                self._socket.send(self._waiting[0], zmq.NOBLOCK)
            except zmq.Again:
                return True
            self._waiting.popleft()
        return False

    def drop(self) -> None:
        """The rank is gone: forget what is queued."""
        self._waiting.clear()


@hook(
    "replace",
    "DataParallelController.launch_dp_attention_schedulers(self, server_args, port_args)",
    expires="SGLang lets a plugin supply the scheduler processes of the controller.",
)
def launch_workers(self: Any, server_args: Any, port_args: Any) -> None:
    """Ranks are forked by the IMM and supervised there; inactive ranks are registered and not started. The sockets to
    them are in the run folder: SGLang would open a TCP port for each of them."""
    from sglang.srt.server_args import PortArgs
    from sglang.srt.utils.network import get_zmq_socket

    from elasticmoe_patches.plugin import report_hooks

    report_hooks("dpc")
    runtime = current_runtime()
    assert runtime is not None
    config = runtime.config
    client = ImmClient(runtime.paths.imm_socket, timeout_s=_BOOT_DEADLINE_S)
    for replica in range(config.num_replicas):
        endpoint = runtime.paths.rank_endpoint(replica)
        self.workers[replica] = WorkerLine(get_zmq_socket(self.context, zmq.PUSH, endpoint, True))
        only_this_user(endpoint)
    for rank in range(config.max_ep_size):
        rank_ports = PortArgs.init_new(server_args, config.replica_of(rank))
        rank_ports.nccl_port = port_args.nccl_port
        rank_ports.instance_id = port_args.instance_id
        arguments = pickle.dumps((server_args, rank_ports, config.device_of(rank)))
        client.send(Register(rank=rank, arguments=arguments))
    members = tuple(range(config.ep_size))
    for rank in members:
        client.send(Assign(join_spec=JoinSpec(rank=rank, members=members, epoch=0, joining_rank=False)))
    infos = _wait_until_ready(client, members)
    client.close()
    self._active_workers = list(config.replicas_of(members))
    self._active_count_cache = len(self._active_workers)
    self.dp_active = [replica in self._active_workers for replica in range(config.num_replicas)]
    self.status = list(self.dp_active)
    api().record_init_infos(self, infos)
    self.max_total_num_tokens = min(int(info["max_total_num_tokens"]) for info in infos)
    self.max_req_input_len = min(int(info["max_req_input_len"]) for info in infos)


def _wait_until_ready(client: ImmClient, members: tuple[int, ...]) -> list[dict[str, Any]]:
    ready: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + _BOOT_DEADLINE_S
    while len(ready) < len(members):
        message = client.receive(max(0.0, deadline - time.monotonic()))
        if message is None:
            missing = [rank for rank in members if rank not in ready]
            raise WorkerError(f"ranks {missing} did not start within {_BOOT_DEADLINE_S:.0f} s")
        if isinstance(message, WorkerNote):
            ready[message.rank] = json.loads(message.note)
        elif isinstance(message, WorkerExited):
            raise WorkerError(
                f"the process of rank {message.rank} ended with status {message.status} while starting",
                rank=message.rank,
                hint="Its log above says why",
            )
        elif isinstance(message, Refused):
            raise WorkerError(f"the IMM refused: {message.reason}", rank=message.rank)
    return [ready[rank] for rank in members]


def _replicas_of(ranks: Iterable[int]) -> tuple[int, ...]:
    """Requests go to attention replicas, each by a socket to the rank that leads it."""
    runtime = current_runtime()
    assert runtime is not None
    return runtime.config.replicas_of(ranks)


def route_to(self: Any, ranks: list[int]) -> None:
    """New requests go to these ranks only."""
    replicas = _replicas_of(ranks)
    self.dp_active = [replica in replicas for replica in range(self.max_dp_size)]
    self.status = list(self.dp_active)
    self._refresh_active_workers()
    self.round_robin_counter = 0


def _on_command(self: Any, request: Any) -> None:
    """Stop routing to retiring ranks, send the fence behind their last request, and pass the commit on to rank 0."""
    from sglang.srt.managers.io_struct import sock_send

    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq

    command = request.command
    route_to(self, [rank for rank in command.before if rank in command.members])
    for replica in _replicas_of(command.retiring):
        sock_send(self.workers[replica], ElasticFenceReq(operation_id=command.operation_id, rank=replica))
    self.send_control_message(request)


def _on_recover_route(self: Any, request: Any) -> None:
    """After a rank's death: what is queued for ranks that are gone is sent again by the tokenizer."""
    from sglang.srt.managers.io_struct import sock_send

    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq

    replicas = _replicas_of(request.ranks)
    for replica, worker in enumerate(self.workers):
        if replica not in replicas:
            worker.drop()
    route_to(self, request.ranks)
    for replica in replicas:
        sock_send(self.workers[replica], ElasticFenceReq(operation_id=request.operation_id, rank=replica))


def _on_resume(self: Any, request: Any) -> None:
    """A request that is on no rank goes to the next one in turn."""
    from sglang.srt.managers.io_struct import sock_send

    wanted = _replicas_of(request.to_ranks)
    active = [replica for replica in wanted if replica in self._active_workers] or self._active_workers
    sock_send(self.workers[active[self.round_robin_counter % len(active)]], request)
    self.round_robin_counter = (self.round_robin_counter + 1) % len(self._active_workers)


@hook(
    "after",
    "DataParallelController.init_dispatcher(self)",
    expires="SGLang lets plugins register controller messages.",
)
def after_init_dispatcher(_result: None, self: Any) -> None:
    """Handles the commit command (re-route, fence, pass on) and routing updates."""
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


@hook(
    "around",
    "DataParallelController.maybe_external_dp_rank_routing(self, req)",
    expires="Upstream answers such a request with an error instead of raising in the controller.",
)
def around_external_routing(original: Any, self: Any, request: Any) -> bool:
    """A request pinned to an inactive rank must not end the controller.

    It goes to any other rank: upstream raises, which ends the server.
    """
    if request.routed_dp_rank is not None and request.routed_dp_rank not in self._active_workers:
        request.routed_dp_rank = None
    return bool(original(self, request))


@hook("around", "DPBudget.dispatch(self, method, estimated_tokens=0)", expires="DPBudget knows the active workers.")
def around_dispatch(original: Any, self: Any, method: Any, estimated_tokens: int = 0) -> int | None:
    """Load-based routing picks among active ranks only.

    An inactive rank always looks idle.
    """
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


@hook("after", "DataParallelController._refresh_active_workers(self)", expires="DPBudget knows the active workers.")
def after_refresh_active_workers(_result: None, self: Any) -> None:
    """Tells the load budget which ranks are active."""
    self.dp_budget.elasticmoe_active = frozenset(self._active_workers)


@hook("replace", "DataParallelController.event_loop(self)", expires="Upstream's loop blocks.")
def event_loop(self: Any) -> None:
    """Waits for messages instead of polling without pause."""
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
