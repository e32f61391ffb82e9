"""Aborts that may have to reach a request which is on its way between two ranks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

# Longer than any request is on its way: what is older was dealt with by the rank that had the request then.
REMEMBERED_S = 60.0


class RecentAborts:
    """What was aborted since requests may have been on their way; what comes in later is checked against it.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: deque[tuple[float, str, bool]] = deque()

    def add(self, rid: str | None, everything: bool) -> None:
        """`rid` as SGLang takes it: all requests whose id begins with it."""
        now = self._clock()
        while self._entries and self._entries[0][0] < now - REMEMBERED_S:
            self._entries.popleft()
        self._entries.append((now, rid or "", everything))

    def clear(self) -> None:
        """From here on: what is on its way now was sent after every abort so far."""
        self._entries.clear()

    def reaches(self, rid: str) -> bool:
        """Whether a request that arrives now was aborted on its way."""
        since = self._clock() - REMEMBERED_S
        return any(at >= since and (everything or rid.startswith(start)) for at, start, everything in self._entries)

    def __len__(self) -> int:
        return len(self._entries)
