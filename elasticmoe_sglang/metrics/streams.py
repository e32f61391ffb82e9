"""What the clients of streams notice of a change: the longest gap between two outputs, and requests that failed."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

_SLOT_S = 0.1
_KEPT_SLOTS = 6000  # ten minutes: longer than any change may take
_KEPT_FAILURES = 10_000


class _Gap(NamedTuple):
    slot: int
    ended: float
    seconds: float

    def overlaps(self, since: float, until: float) -> bool:
        # It stands for all shorter gaps that ended in its slot: those may have ended later, or begun earlier.
        return (self.slot + 1) * _SLOT_S >= since and self.ended - self.seconds - _SLOT_S <= until


class _Failure(NamedTuple):
    at: float
    arrived: float
    refused: bool


class StreamMeter:
    """Keeps the longest gap of every tenth of a second, and the failures, of the last ten minutes.

    `output` and `failed` are called in the tokenizer's thread, everything else in the coordinator's. All times are
    seconds of `clock`.

    Args:
        open_streams: for each open stream that has had output, what `output` returned for it last.
    """

    def __init__(
        self, open_streams: Callable[[], Iterable[float]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self._open_streams = open_streams
        self._gaps: deque[_Gap] = deque(maxlen=_KEPT_SLOTS)
        self._failures: deque[_Failure] = deque(maxlen=_KEPT_FAILURES)
        self._lock = threading.Lock()

    def output(self, last: float | None) -> float:
        """A stream had an output; returns the time, to be given as `last` at its next one.

        Args:
            last: None at the first output: the time until that is no gap.
        """
        now = self.clock()
        if last is not None:
            gap = _Gap(int(now / _SLOT_S), now, now - last)
            with self._lock:
                newest = self._gaps[-1] if self._gaps else None
                if newest is None or newest.slot != gap.slot:
                    self._gaps.append(gap)
                elif newest.seconds < gap.seconds:
                    self._gaps[-1] = gap
        return now

    def failed(self, arrived: float, *, refused: bool) -> None:
        """The server ended a request with an error of its own.

        Args:
            arrived: when the request came. refused: it was answered with 503 before it had any output.
        """
        with self._lock:
            self._failures.append(_Failure(self.clock(), arrived, refused))

    def settled(self, until: float) -> bool:
        """Whether every open stream that had output until then has had another one since."""
        return all(last > until for last in self._open_streams())

    def longest_gap(self, since: float, until: float) -> float | None:
        """Seconds of the longest gap that overlaps this time to within a tenth of a second, those that have not ended
        included; None: no stream had one."""
        now = self.clock()
        with self._lock:
            ended = [gap.seconds for gap in self._gaps if gap.overlaps(since, until)]
        going_on = [now - last for last in self._open_streams() if last <= until]
        return max([*ended, *going_on], default=None)

    def take_failed(self, since: float, until: float) -> int:
        """How many requests have failed since then that had arrived until `until`; those refused only if they had
        arrived before. None is returned twice: a failure counts for the first change that asks."""
        with self._lock:
            found = [failure for failure in self._failures if failure.at >= since and failure.arrived <= until]
            for failure in found:
                self._failures.remove(failure)
        return sum(not failure.refused or failure.arrived < since for failure in found)
