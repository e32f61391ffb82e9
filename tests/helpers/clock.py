"""An event loop for tests of deadlines: where it would sleep until a timer is due, its clock jumps there instead."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class JumpingLoop(asyncio.SelectorEventLoop):
    """For code that waits for nothing but timers and other tasks: no threads, no sockets of others."""

    def __init__(self) -> None:
        super().__init__()
        self._jumped_s = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def jump(timeout: float | None = None) -> Any:
            if timeout is None:
                return select(None)
            events = select(0)
            if not events:
                self._jumped_s += max(0.0, timeout)
            return events

        self._selector.select = jump  # type: ignore[attr-defined]

    def time(self) -> float:
        return super().time() + self._jumped_s


def run(main: Coroutine[Any, Any, T]) -> T:
    """Like `asyncio.run`."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(main)
