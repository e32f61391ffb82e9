"""The coordinator's connections to the workers' agents and to the IMM, and waiting for their messages."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from collections.abc import Callable
from typing import TypeVar

import zmq
import zmq.asyncio

from elasticmoe_sglang.coordinator.imm_line import ImmLine
from elasticmoe_sglang.errors import MalformedMessage, WorkerError
from elasticmoe_sglang.runtime import only_this_user
from elasticmoe_sglang.wire import to_imm, to_worker
from elasticmoe_sglang.wire.to_coordinator import FROM_WORKER, FromImm, FromWorker, WorkerExited

logger = logging.getLogger(__name__)

Incoming = FromWorker | FromImm
Command = (
    to_worker.PullColumns
    | to_worker.DropColumns
    | to_worker.OfferMemory
    | to_worker.ResizeKv
    | to_worker.Park
    | to_worker.GiveUpWaiting
    | to_worker.CountRouted
)
_IncomingT = TypeVar("_IncomingT", bound=Incoming)
_BACKLOG = 1024


class WorkerChannel:
    """Receives all messages and delivers each to whoever waits for it; keeps the latest that nobody waited for.

    Args:
        endpoint: where the workers' agents connect (ROUTER, bound here).
        imm_socket: path of the IMM's socket.
        on_message: called for every message, in the loop's thread.
        start_imm: see `ImmLine`.
    """

    def __init__(
        self,
        endpoint: str,
        imm_socket: str,
        on_message: Callable[[Incoming], None],
        start_imm: Callable[[], subprocess.Popen[bytes] | None],
    ) -> None:
        self._endpoint = endpoint
        self._imm = ImmLine(imm_socket, self._deliver, start_imm)
        self._on_message = on_message
        self._identities: dict[int, bytes] = {}
        self._waiting: list[tuple[Callable[[Incoming], bool], asyncio.Future[Incoming]]] = []
        self._backlog: list[Incoming] = []
        self._tasks: list[asyncio.Task[None]] = []

    def open(self) -> None:
        """Bind and connect; called from the event loop that will use the channel."""
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind(self._endpoint)
        only_this_user(self._endpoint)
        self._imm.open()
        self._tasks.append(asyncio.get_running_loop().create_task(self._receive()))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._imm.close()
        self._router.close()
        self._context.term()

    def tell_imm(self, request: to_imm.Request) -> None:
        """Send a request to the IMM, if need be to the next one."""
        self._imm.tell(request)

    async def tell_worker(self, rank: int, request: to_worker.Request) -> None:
        """Send a message to the agent of the rank's worker. Raises WorkerError when it is not connected."""
        identity = self._identities.get(rank)
        try:
            if identity is None:
                raise zmq.ZMQError(zmq.EHOSTUNREACH)
            await self._router.send_multipart([identity, to_worker.REQUESTS.pack(request)])
        except zmq.ZMQError as error:
            raise WorkerError(f"the worker of rank {rank} is not connected to the coordinator", rank=rank) from error

    async def ask(self, rank: int, message: Command, reply: type[_IncomingT]) -> _IncomingT:
        """Send a message and wait for the worker's reply to its operation. Raises WorkerError."""
        await self.tell_worker(rank, message)
        return await self.wait_for(reply, rank=rank, operation_id=message.operation_id)

    def forget(self, wanted: Callable[[Incoming], bool]) -> None:
        """Drop matching messages that nobody has waited for."""
        self._backlog = [message for message in self._backlog if not wanted(message)]

    async def wait_for(
        self,
        kind: type[_IncomingT],
        *,
        rank: int,
        operation_id: str | None = None,
        exits: bool = True,
        about: Callable[[_IncomingT], bool] = lambda _message: True,
    ) -> _IncomingT:
        """The first message of this kind from this rank, received earlier or in future, for which `about` is true.

        Raises:
            WorkerError: the worker reported a failure of this operation, or (with `exits`) it exited first.
        """

        def wanted(message: Incoming) -> bool:
            if getattr(message, "rank", None) != rank:
                return False
            if isinstance(message, WorkerExited | to_imm.Refused):
                return exits or isinstance(message, kind)
            if isinstance(message, to_worker.Failed):  # one of another operation may be old
                return message.operation_id == operation_id
            same = operation_id is None or getattr(message, "operation_id", operation_id) == operation_id
            return same and isinstance(message, kind) and about(message)

        message = await self._next(wanted)
        if isinstance(message, kind):
            return message
        if isinstance(message, to_worker.Failed):
            raise WorkerError(message.reason, rank=rank, operation=message.operation_id)
        if isinstance(message, to_imm.Refused):
            raise WorkerError(f"the IMM refused: {message.reason}", rank=rank, operation=operation_id)
        assert isinstance(message, WorkerExited)
        raise WorkerError(
            f"the worker of rank {rank} (pid {message.pid}) {message.how}",
            rank=rank,
            operation=operation_id,
            hint="Its log says why",
        )

    async def _next(self, wanted: Callable[[Incoming], bool]) -> Incoming:
        for index, message in enumerate(self._backlog):
            if wanted(message):
                return message if isinstance(message, WorkerExited) else self._backlog.pop(index)
        future: asyncio.Future[Incoming] = asyncio.get_running_loop().create_future()
        entry = (wanted, future)
        self._waiting.append(entry)
        try:
            return await future
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)

    def _deliver(self, message: Incoming) -> None:
        self._on_message(message)
        # An exit is delivered to all who wait for this rank, and kept for later ones until `forget`.
        exited = isinstance(message, WorkerExited)
        for entry in list(self._waiting):
            wanted, future = entry
            if not future.done() and wanted(message):
                self._waiting.remove(entry)
                future.set_result(message)
                if not exited:
                    return
        self._backlog.append(message)
        del self._backlog[:-_BACKLOG]

    async def _receive(self) -> None:
        while True:
            identity, frame = await self._router.recv_multipart()
            try:
                message = FROM_WORKER.unpack(frame)
            except MalformedMessage as error:
                logger.warning("dropped a malformed message from %r: %s", identity, error)
                continue
            self._identities[message.rank] = identity
            self._deliver(message)
