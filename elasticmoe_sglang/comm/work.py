"""Handles that collectives give back. Collectives run to their end in the call, so most handles are finished."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_Base: Any = dist._Work  # type: ignore[attr-defined]  # the stubs do not know that it can be subclassed


class FinishedWork(_Base):  # type: ignore[misc]
    """A collective that is over. `result` is what torch's futures of it hold: the output tensors."""

    def __init__(self, result: list[Any] | None = None) -> None:
        super().__init__()
        self._result = [] if result is None else result

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def result(self) -> list[Any]:
        return self._result

    def synchronize(self) -> None:
        return

    def get_future(self) -> torch.futures.Future[Any]:
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(self._result)
        return future


class PendingWork(FinishedWork):
    """A point-to-point message under way.

    Args:
        finish: waits for it, at most so many seconds (None: the group's timeout).
        done: whether it is over.
        source: the sender's group rank once it is over.
    """

    def __init__(
        self,
        finish: Callable[[float | None], None],
        done: Callable[[], bool],
        source: Callable[[], int],
        result: list[Any],
    ) -> None:
        super().__init__(result)
        self._finish = finish
        self._done = done
        self._source = source

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._finish(timeout.total_seconds() if timeout and timeout > timedelta(0) else None)
        return True

    def is_completed(self) -> bool:
        return self._done()

    def _source_rank(self) -> int:
        return self._source()

    def source_rank(self) -> int:
        return self._source()

    def get_future(self) -> torch.futures.Future[Any]:
        self._finish(None)
        return super().get_future()


FINISHED = FinishedWork()
"""For calls that nobody asks a result of."""
