"""Who is told what the coordinator has done; metrics and traces are observers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from elasticmoe_sglang.coordinator.status import Operation, Status

logger = logging.getLogger(__name__)


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """Recovery from the deaths of workers.

    Attributes:
        dead: ranks whose workers died.
        ranks, epoch: the membership that serves.
        seconds: from the first report of a death until these ranks serve all requests.
        requests_resent: requests of dead ranks that were sent to others.
    """

    dead: list[int]
    ranks: list[int]
    epoch: int
    seconds: float
    requests_resent: int

    @property
    def replaced(self) -> list[int]:
        """Dead ranks whose columns went to a standby worker instead of the survivors."""
        return sorted(set(self.dead) & set(self.ranks))


class Observer:
    """Called in the coordinator's event loop; must return at once. A subclass overrides what it needs."""

    def on_operation_ended(self, operation: Operation) -> None:
        """A change has ended, however; also one that had nothing to change."""

    def on_rank_lost(self, rank: int) -> None:
        """The worker of an active rank has died; recovery begins."""

    def on_recovered(self, recovery: Recovery) -> None:
        """Recovery has succeeded."""

    def on_status(self, status: Status) -> None:
        """The server's state, reported about once a second by `feed_status`."""


class Observers(Observer):
    """Tells several. An error of one is logged: what it observes goes on."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def on_operation_ended(self, operation: Operation) -> None:
        self._tell(lambda observer: observer.on_operation_ended(operation))

    def on_rank_lost(self, rank: int) -> None:
        self._tell(lambda observer: observer.on_rank_lost(rank))

    def on_recovered(self, recovery: Recovery) -> None:
        self._tell(lambda observer: observer.on_recovered(recovery))

    def on_status(self, status: Status) -> None:
        self._tell(lambda observer: observer.on_status(status))

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                call(observer)
            except Exception:
                logger.exception("%s failed; the server is not affected", type(observer).__name__)


async def feed_status(status: Callable[[], Awaitable[Status]], observer: Observer, every_s: float = 1.0) -> None:
    """Report the server's state again and again; runs until cancelled. A state that cannot be told is logged."""
    while True:
        try:
            observer.on_status(await status())
        except Exception:
            logger.exception("the server's state could not be reported to its observers")
        await asyncio.sleep(every_s)
