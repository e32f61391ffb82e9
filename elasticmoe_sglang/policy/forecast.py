"""What load is to be expected: a trend that continues, and a period that repeats. Both set a floor, never a ceiling."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BIN_S = 10.0
_KEPT = 2 * 8640
"""Two days."""
_TREND_BINS = 12
_TREND_SURE = 3.5
"""A trend counts when its slope is this many times its own standard error."""
_PERIOD_LEAST_BINS = 12
_PERIOD_SURE = 0.6
"""Correlation of the load with itself one period ago that makes a period."""
_CHANCE = 3.0
"""Correlation of n bins of noise stays below this many times 1/sqrt(n)."""
_SAME_PEAK = 0.9
_PERIODS_USED = 3
_REFRESH_S = 60.0

Array = npt.NDArray[np.float64]


class Forecast(NamedTuple):
    """Tokens a second that requests are expected to ask for, and the reason."""

    tokens_per_s: float
    because: str


class DemandHistory:
    """Output tokens that arriving requests ask for, in bins of BIN_S seconds. A look for a period is made at most once
    a minute."""

    def __init__(self) -> None:
        self._bins = np.zeros(_KEPT)
        self._squares = np.zeros(_KEPT)
        self._first: int | None = None  # bin numbers, counted from time 0
        self._newest = 0
        self._newest_ends = -math.inf
        self._sum = self._sum_of_squares = 0.0  # of the newest bin
        self._period: int | None = None
        self._looked_at = -math.inf

    def add(self, at: float, tokens: float) -> None:
        """A request arrived that will ask for about this many tokens."""
        if at >= self._newest_ends:
            self._advance(at)
        # One that comes late counts for the newest bin.
        self._sum += tokens
        self._sum_of_squares += tokens * tokens

    def _advance(self, now: float) -> None:
        number = math.floor(now / BIN_S)
        if self._first is None:
            self._first = self._newest = number
        if number > self._newest:
            self._bins[self._newest % _KEPT], self._squares[self._newest % _KEPT] = self._sum, self._sum_of_squares
            self._sum = self._sum_of_squares = 0.0
        for missing in range(self._newest + 1, min(number, self._newest + _KEPT) + 1):
            self._bins[missing % _KEPT] = self._squares[missing % _KEPT] = 0.0
        self._newest = max(self._newest, number)
        self._newest_ends = (self._newest + 1) * BIN_S

    def expected(self, now: float, lead_s: float) -> Forecast | None:
        """The most that trend or period promise for the next `lead_s` seconds; None: neither is seen."""
        self._advance(now)
        rates = self._complete(self._bins) / BIN_S
        trend = _trend(rates, self._complete(self._squares)[-_TREND_BINS:], lead_s)
        found = [forecast for forecast in (trend, self._seasonal(rates, now, lead_s)) if forecast]
        return max(found, default=None)

    def _complete(self, bins: Array) -> Array:
        """The bins that are over, oldest first."""
        assert self._first is not None, "time has advanced"
        first = max(self._first + 1, self._newest - _KEPT + 1)  # the first one was not seen from its beginning
        return bins[np.arange(first, self._newest) % _KEPT]

    def _seasonal(self, rates: Array, now: float, lead_s: float) -> Forecast | None:
        if now - self._looked_at >= _REFRESH_S:
            self._looked_at = now
            self._period = find_period(rates)
        period = self._period
        if period is None:
            return None
        values = []
        # The bins that the next lead_s seconds fall into, counted from the end of `rates`; the current one is 0.
        for ahead in range(math.ceil(lead_s / BIN_S) + 1):
            past = [
                float(rates[max(0, at - 1) : at + 2].mean())
                for back in range(1, _PERIODS_USED + 1)
                if 0 <= (at := len(rates) + ahead - back * period) < len(rates)
            ]
            if past:
                values.append(sum(past) / len(past))
        if not values:
            return None
        return Forecast(max(values), f"the load repeats every {period * BIN_S:.0f} s")


def _trend(rates: Array, squares: Array, lead_s: float) -> Forecast | None:
    """Args:
    squares: sum of squared tokens in each of the last bins, which is their variance where requests come at random.
    """
    recent = rates[-_TREND_BINS:]
    if len(recent) < _TREND_BINS:
        return None
    x = np.arange(_TREND_BINS) - (_TREND_BINS - 1) / 2
    slope = float((x * recent).sum() / (x * x).sum())
    level = float(recent.mean())
    residual = recent - level - slope * x
    # A line may fit a few random bins by chance: what is left over is never taken for less than randomness makes.
    spread = max(float((residual**2).sum()) / (_TREND_BINS - 2), float(squares.mean()) / BIN_S**2)
    if slope <= _TREND_SURE * math.sqrt(spread / float((x * x).sum())) or slope <= 0:
        return None
    ahead = (_TREND_BINS - 1) / 2 + 0.5 + lead_s / BIN_S
    return Forecast(level + slope * ahead, f"the load rises by {slope / BIN_S:.3g} tokens/s each second")


def find_period(rates: Array) -> int | None:
    """Bins after which the load repeats; None: it does not, or fewer than two periods were seen."""
    longest = len(rates) // 2
    if longest < _PERIOD_LEAST_BINS:
        return None
    centred = rates - rates.mean()
    if not float((centred * centred).sum()) > 0:
        return None
    padded = np.fft.rfft(centred, 2 * len(centred))
    products = np.fft.irfft(padded * np.conj(padded))[: longest + 1]
    # Each lag is judged by the parts that overlap, or long periods would never be found.
    squares = np.concatenate(([0.0], np.cumsum(centred * centred)))
    lags = np.arange(longest + 1)
    head, tail = squares[len(centred) - lags], squares[-1] - squares[lags]
    correlation = products / np.sqrt(np.maximum(head * tail, 1e-12))
    # Neighbouring bins are alike without any period: what counts comes after the first lag that is unlike.
    unlike = np.flatnonzero(correlation < 0)
    if not len(unlike) or unlike[0] >= longest:
        return None
    start = max(int(unlike[0]), _PERIOD_LEAST_BINS)
    if start > longest:
        return None
    # Two periods are a period too: of peaks that are about as high, the first one counts.
    best = start + int(np.argmax(correlation[start:] >= _SAME_PEAK * correlation[start:].max()))
    while best < longest and correlation[best + 1] > correlation[best]:
        best += 1
    sure = max(_PERIOD_SURE, _CHANCE / math.sqrt(len(centred) - best))
    return best if correlation[best] >= sure else None
