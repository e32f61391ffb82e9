"""Sliding windows in buckets of one second: adding is O(1), a look costs one step for each second of the window."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

_STEPS_PER_OCTAVE = 8
"""Quantiles are exact to half a step: 4.4 %."""
_FIRST_OCTAVE, _LAST_OCTAVE = -16, 12
"""From 15 microseconds to 68 minutes."""
_STEPS = (_LAST_OCTAVE - _FIRST_OCTAVE) * _STEPS_PER_OCTAVE


class Durations:
    """How many durations fell into each of logarithmic steps."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        # Adding to an array is three times as fast as to numpy's; numpy reads it without a copy.
        self._counts: array[int] | None = None

    def add(self, seconds: float) -> None:
        if self._counts is None:
            self._counts = array("q", bytes(8 * _STEPS))
        step = int((math.log2(seconds) - _FIRST_OCTAVE) * _STEPS_PER_OCTAVE) if seconds > 0 else 0
        self._counts[0 if step < 0 else step if step < _STEPS else _STEPS - 1] += 1

    @staticmethod
    def quantiles(parts: Iterable[Durations], shares: tuple[float, ...]) -> list[float | None]:
        """Seconds below which each share lies, over all parts; None without any duration."""
        counts = [np.frombuffer(part._counts, dtype=np.int64) for part in parts if part._counts is not None]
        if not counts:
            return [None] * len(shares)
        below = np.cumsum(np.sum(counts, axis=0))
        steps = np.searchsorted(below, [math.ceil(share * int(below[-1])) for share in shares])
        return [2.0 ** (_FIRST_OCTAVE + (int(step) + 0.5) / _STEPS_PER_OCTAVE) for step in steps]


@dataclass
class Bucket:
    """What happened in one second.

    Attributes:
        first_ok, first_late: first tokens within and beyond the TTFT limit; one that is overdue counts as late when the
            limit passes. pace_ok, pace_late: ended requests within and beyond the ITL limit. All of them only for
            requests that arrived after the estimator's last mark.
        attained, missed: ended requests that met the whole SLO, or not.
        good_tokens: output tokens of those that did.
        produced_tokens: output tokens of all requests, when they came.
        busy_s, running_s: seconds covered by samples, and their integral of running requests.
        waiting_least: the shortest queue seen; None: not sampled.
    """

    arrivals: int = 0
    prompt_tokens: int = 0
    first_ok: int = 0
    first_late: int = 0
    pace_ok: int = 0
    pace_late: int = 0
    attained: int = 0
    missed: int = 0
    good_tokens: int = 0
    produced_tokens: int = 0
    busy_s: float = 0.0
    running_s: float = 0.0
    waiting_least: int | None = None
    ttft: Durations = field(default_factory=Durations)
    itl: Durations = field(default_factory=Durations)


class Buckets:
    """The latest `seconds` buckets. Times never go back by more than what is kept; older ones count as the oldest."""

    def __init__(self, seconds: int) -> None:
        self._kept: deque[Bucket] = deque(maxlen=seconds)
        self._newest: int | None = None
        self._looked_at: int | None = None
        self._found = Bucket()

    def at(self, moment: float) -> Bucket:
        """The bucket that a moment belongs to."""
        second = math.floor(moment)
        if second == self._looked_at:
            return self._found
        if self._newest is None:
            self._newest = second
            self._kept.append(Bucket())
        missing = min(second - self._newest, self._kept.maxlen or 0)
        for _ in range(missing):
            self._kept.append(Bucket())
        self._newest = max(self._newest, second)
        self._looked_at = second
        self._found = self._kept[max(-len(self._kept), second - self._newest - 1)]
        return self._found

    def last(self, seconds: float, now: float) -> Iterator[Bucket]:
        """The buckets of the whole seconds before the current one, newest first."""
        self.at(now)
        count = min(math.ceil(seconds), len(self._kept) - 1)
        return (self._kept[-2 - back] for back in range(count))

    def clear_outcomes(self) -> None:
        """Forget what requests got, for everything that was judged so far."""
        for bucket in self._kept:
            bucket.first_ok = bucket.first_late = bucket.pace_ok = bucket.pace_late = 0
