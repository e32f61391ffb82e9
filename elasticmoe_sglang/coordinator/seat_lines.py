"""The lines on which the coordinator hears seats and the IMM, and a way to wait for what they say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TypeVar

import msgspec
import zmq
import zmq.asyncio

from elasticmoe_sglang.errors import SeatError
from elasticmoe_sglang.imm import messages as imm
from elasticmoe_sglang.imm.client import ImmClient
from elasticmoe_sglang.seats import messages as sm

logger = logging.getLogger(__name__)

Heard = sm.Message | imm.Message
_HeardT = TypeVar("_HeardT", bound=Heard)
_BACKLOG = 1024


class SeatLines:
    """Hears everything, keeps the last messages, and wakes whoever waits for one.

    Args:
        endpoint: where the seats' agents connect (ROUTER, bound here).
        imm_socket: the IMM's socket.
        on_heard: called for every message, in the loop's thread.
        on_imm_lost: the IMM has ended, and with it every seat.
    """

    def __init__(
        self,
        endpoint: str,
        imm_socket: str,
        on_heard: Callable[[Heard], None],
        on_imm_lost: Callable[[str], None],
    ) -> None:
        self._endpoint = endpoint
        self._imm_socket = imm_socket
        self._on_heard = on_heard
        self._on_imm_lost = on_imm_lost
        self._identities: dict[int, bytes] = {}
        self._waiting: list[tuple[Callable[[Heard], bool], asyncio.Future[Heard]]] = []
        self._backlog: list[Heard] = []
        self._tasks: list[asyncio.Task[None]] = []

    def open(self) -> None:
        """Bind and connect; call from the loop that will use it."""
        self._context = zmq.asyncio.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind(self._endpoint)
        self._imm = ImmClient(self._imm_socket)
        loop = asyncio.get_running_loop()
        # Seats may have been assigned before this connection was made; the answer says who sits where.
        self._imm.send(imm.Query())
        loop.add_reader(self._imm.fileno(), self._imm_readable)
        self._tasks.append(loop.create_task(self._hear_seats()))

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._imm.fileno())
        for task in self._tasks:
            task.cancel()
        self._imm.close()
        self._router.close()
        self._context.term()

    def tell_imm(self, message: imm.Message) -> None:
        self._imm.send(message)

    async def tell_seat(self, seat: int, message: sm.Message) -> None:
        """Raises SeatError when the seat's agent is not connected."""
        identity = self._identities.get(seat)
        try:
            if identity is None:
                raise zmq.ZMQError(zmq.EHOSTUNREACH)
            await self._router.send_multipart([identity, sm.encode(message)])
        except zmq.ZMQError as error:
            raise SeatError(f"seat {seat} has no line to the coordinator", seat=seat) from error

    def forget(self, wanted: Callable[[Heard], bool]) -> None:
        """Drop matching messages that nobody has waited for."""
        self._backlog = [message for message in self._backlog if not wanted(message)]

    async def expect(
        self,
        kind: type[_HeardT],
        *,
        seat: int,
        operation_id: str | None = None,
        exits: bool = True,
        about: Callable[[_HeardT], bool] = lambda _message: True,
    ) -> _HeardT:
        """The next (or an already heard) message of this kind from this seat, of which `about` is true.

        Raises:
            SeatError: the seat reported a failure of this operation, or (with `exits`) its process ended first.
        """

        def wanted(message: Heard) -> bool:
            if getattr(message, "seat", None) != seat:
                return False
            if isinstance(message, imm.SeatExited | imm.Refused):
                return exits or isinstance(message, kind)
            if isinstance(message, sm.Failed):  # of another operation it may be old
                return message.operation_id == operation_id
            same = operation_id is None or getattr(message, "operation_id", operation_id) == operation_id
            return same and isinstance(message, kind) and about(message)

        heard = await self._next(wanted)
        if isinstance(heard, kind):
            return heard
        if isinstance(heard, sm.Failed):
            raise SeatError(heard.reason, seat=seat, operation=heard.operation_id)
        if isinstance(heard, imm.Refused):
            raise SeatError(f"the IMM refused: {heard.reason}", seat=seat, operation=operation_id)
        assert isinstance(heard, imm.SeatExited)
        raise SeatError(
            f"the process of seat {seat} (pid {heard.pid}) ended with status {heard.status}",
            seat=seat,
            operation=operation_id,
            hint="Its log says why",
        )

    async def _next(self, wanted: Callable[[Heard], bool]) -> Heard:
        for index, message in enumerate(self._backlog):
            if wanted(message):
                return message if isinstance(message, imm.SeatExited) else self._backlog.pop(index)
        future: asyncio.Future[Heard] = asyncio.get_running_loop().create_future()
        entry = (wanted, future)
        self._waiting.append(entry)
        try:
            return await future
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)

    def _heard(self, message: Heard) -> None:
        self._on_heard(message)
        # An exit concerns everybody who waits for the seat, and whoever will ask until another process takes it.
        exited = isinstance(message, imm.SeatExited)
        for entry in list(self._waiting):
            wanted, future = entry
            if not future.done() and wanted(message):
                self._waiting.remove(entry)
                future.set_result(message)
                if not exited:
                    return
        self._backlog.append(message)
        del self._backlog[:-_BACKLOG]

    async def _hear_seats(self) -> None:
        while True:
            identity, frame = await self._router.recv_multipart()
            try:
                message = sm.decode(frame)
            except msgspec.DecodeError as error:
                logger.warning("dropped a malformed message from %r: %s", identity, error)
                continue
            self._identities[getattr(message, "seat", -1)] = identity
            self._heard(message)

    def _imm_readable(self) -> None:
        try:
            message = self._imm.receive(0)
        except SeatError as error:
            asyncio.get_running_loop().remove_reader(self._imm.fileno())
            self._on_imm_lost(str(error))
            return
        if message is not None:
            self._heard(message)
