"""The server's state as server-sent events. However many readers there are, the coordinator is asked once."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.status import Operation, Status
from elasticmoe_sglang.errors import TooManyReaders
from elasticmoe_sglang.event_loop import run_in
from elasticmoe_sglang.live_figures import Figures, LiveFigures

MAX_READERS = 64
OPERATIONS = 20
PERIOD_S = 1.0
"""Between two events while nothing changes."""
_LOOK_S = 0.1
"""How soon an event follows a change."""
_SIGN_OF_LIFE_S = 1.0
"""An HMM that does not answer delays an event, so that a reader gets a comment after this time."""


class Event(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Data of each `state` event.

    Attributes:
        instance: another one after the server was restarted.
        model: the name under which it is served.
        at: Unix time in seconds.
        figures: the seconds that have ended since the reader's event before; in its first one all that are kept.
        operations: the latest OPERATIONS, newest first, without their `moves`; only when they have changed.
    """

    instance: str
    model: str
    at: float
    status: Status
    figures: list[Figures]
    operations: list[Operation] | UnsetType = UNSET


class _Snapshot(Struct, frozen=True):
    at: float
    status: Status
    operations: list[Operation]


class Feed:
    """Readers are served in one event loop, that of the figures.

    Args:
        loop: the coordinator's event loop; None: the readers'.
        ending: whether the server ends; then the readers' streams do.
        instance_id: names this start of the server; None: a new name.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        figures: LiveFigures,
        *,
        model: str = "",
        loop: asyncio.AbstractEventLoop | None = None,
        ending: Callable[[], bool] = lambda: False,
        instance_id: str | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._figures = figures
        self._model = model
        self._loop = loop
        self._ending = ending
        self._instance = instance_id or uuid.uuid4().hex
        self._readers = 0
        self._watch: asyncio.Task[None] | None = None
        self._snapshot: _Snapshot | None = None
        self._next: asyncio.Future[None] | None = None

    def open(self) -> AsyncIterator[bytes]:
        """The stream of one more reader, `text/event-stream`.

        Raises:
            TooManyReaders: there are MAX_READERS.
        """
        if self._readers >= MAX_READERS:
            raise TooManyReaders(f"{MAX_READERS} readers follow the server already", hint="Close one of them")
        return self._events()

    async def _events(self) -> AsyncIterator[bytes]:
        self._readers += 1
        try:
            if self._watch is None:
                self._watch = asyncio.get_running_loop().create_task(self._look())
            known: _Snapshot | None = None
            second: int | None = None
            while not self._ending():
                snapshot = self._snapshot
                if snapshot is None or snapshot is known:
                    if not await self._news(self._watch):
                        yield b": no news\n\n"
                    continue
                figures = self._figures.since(second)
                second = figures[-1].at if figures else second
                same = known is not None and known.operations == snapshot.operations
                yield self._frame(snapshot, figures, same)
                known = snapshot
        finally:
            self._readers -= 1
            if self._readers == 0 and self._watch is not None:
                self._watch.cancel()
                self._watch = self._snapshot = None

    async def _news(self, watch: asyncio.Task[None]) -> bool:
        """Wait for the next snapshot or until it is time for a sign of life; an error of the watch is raised here."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait({self._next, watch}, timeout=_SIGN_OF_LIFE_S, return_when=asyncio.FIRST_COMPLETED)
        if watch in done:
            watch.result()
        return bool(done)

    def _frame(self, snapshot: _Snapshot, figures: list[Figures], same_operations: bool) -> bytes:
        event = Event(
            instance=self._instance,
            model=self._model,
            at=snapshot.at,
            status=snapshot.status,
            figures=figures,
            operations=UNSET if same_operations else snapshot.operations,
        )
        return b"event: state\ndata: " + msgspec.json.encode(event) + b"\n\n"

    async def _look(self) -> None:
        """For as long as there are readers."""
        while True:
            seen, asked_at = self._sign(), time.monotonic()
            status = await self._call(self._coordinator.status())
            self._publish(_Snapshot(time.time(), status, self._operations()))
            while not self._ending() and self._sign() == seen and time.monotonic() - asked_at < PERIOD_S:
                await asyncio.sleep(_LOOK_S)
            if self._ending():
                self._wake()
                return

    def _sign(self) -> tuple[object, ...]:
        """Differs when something has changed that readers shall see at once."""
        operation = self._coordinator.running or self._coordinator.last
        epoch = self._coordinator.view.membership.epoch
        if operation is None:
            return (epoch,)
        return epoch, operation.operation_id, operation.phase, operation.columns_moved

    def _operations(self) -> list[Operation]:
        latest = self._coordinator.operations()[:OPERATIONS]
        return [msgspec.structs.replace(operation, moves=[]) for operation in latest]

    def _publish(self, snapshot: _Snapshot) -> None:
        self._snapshot = snapshot
        self._wake()

    def _wake(self) -> None:
        if self._next is not None:
            self._next.set_result(None)
            self._next = None

    async def _call(self, coroutine: Coroutine[Any, Any, Status]) -> Status:
        return await (coroutine if self._loop is None else run_in(self._loop, coroutine))
