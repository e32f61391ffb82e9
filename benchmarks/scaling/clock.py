"""The run's clock: seconds since its start, from the machine's monotonic clock."""

from __future__ import annotations

import time


class Clock:
    """Starts when it is made."""

    def __init__(self) -> None:
        self._origin = time.monotonic()
        self._unix = time.time()

    def now(self) -> float:
        return time.monotonic() - self._origin

    def of(self, monotonic: float) -> float:
        """A reading of time.monotonic() on this clock."""
        return monotonic - self._origin

    def of_unix(self, unix: float) -> float:
        """A Unix time of this machine on this clock."""
        return unix - self._unix
