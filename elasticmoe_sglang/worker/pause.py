"""How long a commit kept this rank from producing tokens."""

from __future__ import annotations

import statistics
import time
from collections import deque

_REMEMBERED = 64


class PauseMeter:
    """Fed with every batch result; measures the pause around a commit.

    The pause is the time from the last result before the commit to the first after it, less the median of the
    intervals between results before it (the definition of docs/architecture.md, in milliseconds).
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._intervals: deque[float] = deque(maxlen=_REMEMBERED)
        self._operation: str | None = None

    def committed(self, operation_id: str) -> None:
        self._operation = operation_id

    def idle(self) -> None:
        """Nothing is running: the next result says nothing about a pause."""
        self._last = None
        self._operation = None

    def result(self) -> tuple[str, float, float] | None:
        """A batch's result was processed. Returns (operation, pause_ms, median_ms) for the first after a commit."""
        now = time.monotonic()
        last, self._last = self._last, now
        if last is None:
            self._operation = None
            return None
        interval = (now - last) * 1e3
        operation, self._operation = self._operation, None
        if operation is None:
            self._intervals.append(interval)
            return None
        if not self._intervals:
            return None
        median = statistics.median(self._intervals)
        return operation, max(0.0, interval - median), median
