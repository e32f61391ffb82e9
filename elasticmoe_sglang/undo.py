"""Undo log of a transaction: steps, each with the call that undoes it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from elasticmoe_sglang.errors import UndoFailed

logger = logging.getLogger(__name__)

_ResultT = TypeVar("_ResultT")


class UndoLog(Generic[_ResultT]):
    """Each undo is handed out once, the latest first.

    Undos that return None (`UndoLog[None]`) can be run here, by `undo` or by leaving a `with` block with an exception.
    Whoever records coroutine functions awaits what `take` returns.
    """

    def __init__(self, operation: str | None = None) -> None:
        self._operation = operation
        self._steps: list[tuple[str, Callable[[], _ResultT]]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def record(self, step: str, undo: Callable[[], _ResultT]) -> None:
        """Note how to undo `step`: once it has succeeded if it is atomic, before it starts if half of it can remain."""
        self._steps.append((step, undo))

    def absorb(self, other: UndoLog[_ResultT]) -> None:
        """Move the steps of another log to the end of this one."""
        self._steps += other._steps
        other._steps = []

    def take(self) -> list[tuple[str, Callable[[], _ResultT]]]:
        """The steps with their undos, the latest first; the log is empty afterwards."""
        steps, self._steps = self._steps[::-1], []
        return steps

    def undo(self: UndoLog[None]) -> None:
        """Undo every step, the latest first, also when some fail. Raises UndoFailed for those that failed."""
        failures: list[str] = []
        for step, undo in self.take():
            try:
                undo()
            except Exception as error:
                logger.exception("undo failed: %s (operation %s)", step, self._operation)
                failures.append(f"{step}: {error}")
        if failures:
            raise UndoFailed(
                f"{len(failures)} steps could not be undone: {'; '.join(failures)}",
                operation=self._operation,
                hint="What these steps made still exists; compare `elasticmoe status` with what is in use.",
            )

    def __enter__(self: UndoLog[None]) -> UndoLog[None]:
        return self

    def __exit__(
        self: UndoLog[None],
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.undo()
