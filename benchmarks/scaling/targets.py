"""Every target of this project's benchmarks, in one list; each experiment is held to those that name it.

A target that was not measured is missed. `docs/benchmarks.md` defines the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarks.scaling.summary import Results, Stat


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A figure's median and its limit.

    Attributes:
        row, metric: as in the experiment's figures.
        over: the figure is divided by the same of this row; of several, by the smallest one that was measured.
        at_least: the limit is a lower one.
        worst: the largest value counts, not the median.
        unit: "s", "ms", "%" (of a share, 0.02 is 2 %), "x" or "".
    """

    text: str
    experiment: str
    row: str
    metric: str
    limit: float
    at_least: bool = False
    worst: bool = False
    over: tuple[str, ...] = ()
    unit: str = ""


_BASELINES = tuple(f"{method}: up at 0.8" for method in ("cold-restart", "replica", "colocated"))
_UP, _MOST, _DOWN = "elastic: up at 0.8", "elastic: up at 1.2", "elastic: down at 0.5"
_GAP = "streams' longest gap, p99, beyond 3 medians + 50 ms"
_PAUSE = "pause at the commit, median of ranks"


def _scale(text: str, row: str, metric: str, limit: float, unit: str, **more: Any) -> Target:
    return Target(text=text, experiment="scale", row=row, metric=metric, limit=limit, unit=unit, **more)


def _each(text: str, metric: str, limit: float, unit: str = "", **more: Any) -> list[Target]:
    rows = {"up at 0.8": _UP, "up at 1.2": _MOST, "down at 0.5": _DOWN}
    return [_scale(f"{text}, {way}", row, metric, limit, unit, **more) for way, row in rows.items()]


def _timing(text: str, way: str, metric: str, limit: float, unit: str) -> Target:
    row = f"elastic, 2 of 4: changes, {way}"
    return Target(text=f"{text}, {way}, 2 of 4", experiment="timing", row=row, metric=metric, limit=limit, unit=unit)


TARGETS: tuple[Target, ...] = (
    _scale("tokens/s after one rank more over before, overloaded (1.2)", _MOST, "gain", 1.5, "x", at_least=True),
    *_each("failed requests, all repetitions", "failed", 0, worst=True),
    *_each("downtime, worst repetition", "downtime_s", 0, "s", worst=True),
    *_each(_PAUSE, "pause_p50_s", 0.010, "ms"),
    *_each(_GAP, "gap_over_s", 0, "ms"),
    *_each("longest gap of a stream over its limit, worst repetition", "worst_gap_over_limit", 1, "x", worst=True),
    _scale("one rank up, until it serves", _UP, "scale_latency_s", 1, "s"),
    _scale("one rank down, until all is done", _DOWN, "total_s", 0.5, "s"),
    _scale("tokens/s during / before, up at 0.8", _UP, "during_over_before", 0.95, "x", at_least=True),
    _scale("TTFT p99 of requests that arrive during / before, up at 0.8", _UP, "ttft_during_over_before", 2, "x"),
    *_each("memory peak over the larger steady state", "memory_over", 0.02, "%"),
    _scale("scale latency over the best baseline's", _UP, "scale_latency_s", 0.05, "x", over=_BASELINES),
    _scale("capacity at two ranks over plain SGLang with gloo", "elastic: closed loop at 2", "capacity", 3, "x",
           over=("plain 2: closed loop at 2",), at_least=True),
    *(_timing(_PAUSE, way, "pause_p50_s", 0.010, "ms") for way in ("up", "down")),
    *(_timing(_GAP, way, "gap_over_s", 0, "ms") for way in ("up", "down")),
    _timing("one rank, until all is done", "up", "total_s", 1, "s"),
    _timing("one rank, until all is done", "down", "total_s", 0.5, "s"),
    *(
        Target(text=f"tokens/s over plain SGLang with gloo, 2 of {largest}", experiment="timing",
               row=f"elastic, 2 of {largest}: closed loop at 2", metric="capacity",
               over=("plain 2: closed loop at 2",), limit=3, at_least=True, unit="x")
        for largest in (2, 4)
    ),
    *(
        Target(text=f"tokens/s of one rank of {largest} over plain SGLang, {lanes} at a time", experiment="reserve",
               row=f"elastic, 1 of {largest}: {lanes} at a time", metric="capacity",
               over=(f"plain 1: {lanes} at a time",), limit=0.98, at_least=True, unit="x")
        for largest in (2, 4, 8)
        for lanes in (1, 8)
    ),
    Target(text="tokens/s after columns were placed by load over before", experiment="rebalance",
           row="rebalanced: closed loop", metric="gain", limit=1.1, at_least=True, unit="x"),
    Target(text="failed requests, all repetitions, rebalanced", experiment="rebalance",
           row="rebalanced: closed loop", metric="failed", limit=0, worst=True),
    Target(text="memory peak over the larger steady state, 2 to 4 ranks, 249 MiB copied", experiment="ablation",
           row="elastic: up", metric="memory_over", limit=0.02, unit="%"),
)  # fmt: skip


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A target and what was found; `value` None: nothing was."""

    target: Target
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.target.limit if self.target.at_least else self.value <= self.target.limit

    @property
    def found(self) -> str:
        if self.value is None:
            return "not measured"
        interval = (
            "" if self.low is None or self.high is None else f" [{self._show(self.low)}, {self._show(self.high)}]"
        )
        return f"{self._show(self.value)}{interval}, n = {self.n}"

    @property
    def wanted(self) -> str:
        return f"{'at least' if self.target.at_least else 'at most'} {self._show(self.target.limit)}"

    @property
    def outcome(self) -> str:
        """ "met", or "missed by" how much, in the target's unit."""
        if self.met:
            return "met"
        return (
            "**missed**" if self.value is None else f"**missed** by {self._show(abs(self.value - self.target.limit))}"
        )

    def _show(self, value: float) -> str:
        unit = self.target.unit
        if unit == "ms":
            return f"{value * 1e3:.1f} ms"
        if unit == "%":
            return f"{value * 100:+.1f} %"
        return f"{value:.2f} {unit}" if unit else f"{value:g}"


def judge(results: Results, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """The verdict on each target of this experiment."""
    return [_verdict(results, target) for target in targets if target.experiment == results.experiment]


def _verdict(results: Results, target: Target) -> Verdict:
    found = results.stat(target.row, target.metric)
    if found is None:
        return Verdict(target=target, value=None)
    base = 1.0
    if target.worst:
        return Verdict(target=target, value=max(found.values), n=found.n)
    if target.over:
        others = [results.stat(row, target.metric) for row in target.over]
        base = min((other.median for other in others if other is not None), default=0.0)
        if not base:
            return Verdict(target=target, value=None)
    return Verdict(target=target, value=found.median / base, n=found.n, **_interval(found, base, target))


def _interval(found: Stat, base: float, target: Target) -> dict[str, float | None]:
    """Of a quotient, that of its numerator: the baseline's own spread is in its row."""
    if found.low is None or found.high is None:
        return {}
    return {"low": found.low / base, "high": found.high / base}
