"""Loads for the policy: steady, ramp, burst, daily, or a file. All are written down before any policy runs on them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scaling.workload import Lengths, Workload

Rate = Callable[[float], float]

KINDS = ("steady", "ramp", "burst", "daily")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Arrival in seconds since the start, and lengths in tokens."""

    at: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Requests in order of arrival. `period_s` is that of the load, 0 where it has none."""

    name: str
    duration_s: float
    requests: tuple[Request, ...]


def shape(kind: str) -> tuple[Rate, float]:
    """Load over time as a share of its peak, and the duration in seconds.

    steady: half. ramp: from a fifth to the peak in ten minutes, five minutes there, and back. burst: a quarter, with a
    minute at the peak every six. daily: six "days" of ten minutes from an eighth to the peak, as a sine.
    """
    if kind == "steady":
        return lambda t: 0.5, 1200.0
    if kind == "ramp":
        return lambda t: 0.2 + 0.8 * min(1.0, max(0.0, min(t - 60.0, 1560.0 - t) / 600.0)), 1620.0
    if kind == "burst":
        return lambda t: 1.0 if t % 360.0 >= 300.0 else 0.25, 1800.0
    if kind == "daily":
        low, day = 0.125, 600.0
        return lambda t: low + (1 - low) * (0.5 - 0.5 * math.cos(2 * math.pi * t / day)), 6 * day
    raise ValueError(f"no trace {kind!r}")


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """The first `duration_s` seconds of a load that runs `faster` than it was described."""

    faster: float
    duration_s: float


LIVE = {
    "steady": Excerpt(faster=1.0, duration_s=90.0),
    "ramp": Excerpt(faster=13.5, duration_s=120.0),
    "burst": Excerpt(faster=6.0, duration_s=120.0),
    "daily": Excerpt(faster=5.0, duration_s=360.0),
}
"""For a real server, so that a run is a few minutes: the whole ramp in two minutes, two bursts of ten seconds a minute
apart, three days of two minutes."""


def make_trace(
    kind: str, peak_rate: float, prompt: Lengths, output: Lengths, *, seed: int = 0, excerpt: Excerpt | None = None
) -> Trace:
    """Poisson arrivals of at most `peak_rate` requests a second."""
    described, duration_s = shape(kind)
    faster = 1.0
    if excerpt is not None:
        faster, duration_s = excerpt.faster, excerpt.duration_s

    def rate(now: float) -> float:
        return described(now * faster)

    rng = random.Random(f"{kind}/{seed}")
    requests = []
    now = rng.expovariate(peak_rate)
    while now < duration_s:
        if rng.random() < rate(now):  # thinning
            requests.append(Request(at=now, prompt_tokens=prompt.draw(rng), output_tokens=output.draw(rng)))
        now += rng.expovariate(peak_rate)
    return Trace(name=kind, duration_s=duration_s, requests=tuple(requests))


def read_trace(path: Path) -> Trace:
    """JSON lines {"at", "prompt_words", "output_tokens"}, as for the other benchmarks. Raises UserInputError."""
    requests = tuple(
        Request(at=arrival.due_at, prompt_tokens=arrival.prompt_words, output_tokens=arrival.output_tokens)
        for arrival in Workload(trace=path).arrivals()
    )
    return Trace(name=path.stem, duration_s=requests[-1].at if requests else 0.0, requests=requests)
