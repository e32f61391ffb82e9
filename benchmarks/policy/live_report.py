"""Figures of `elasticmoe bench autoscale --live`, and their report, in which every number is computed from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarks.scaling.machine import checkout
from benchmarks.scaling.report import table

ATTAIN_SHARE, COST_SHARE = 0.95, 0.7


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of n values; None where there is none. p99 is the smallest value that 99 % do not exceed."""

    n: int
    p50: float | None = None
    p99: float | None = None
    most: float | None = None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Quantiles:
        """Those that are not None."""
        known = sorted(value for value in values if value is not None)
        if not known:
            return cls(n=0)
        at = [known[max(0, math.ceil(share * len(known)) - 1)] for share in (0.5, 0.99, 1.0)]
        return cls(n=len(known), p50=round(at[0], 4), p99=round(at[1], 4), most=round(at[2], 4))


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Closed loop: `streams` requests always run. itl_s: of those that ended, each one's mean."""

    size: int
    streams: int
    seconds: float
    tokens_per_s: float
    itl_s: Quantiles
    load_average: float


class LiveRun(msgspec.Struct, frozen=True, kw_only=True):
    """One governor on one load.

    Attributes:
        attained: requests that were complete within the SLO, from the moment they were due.
        incomplete: requests without all of their tokens a minute after the load's end; failures: why, at most five.
        tokens_per_s: that arrived until the load's end.
        sizes: (second, size) of the start and of every change.
        client_lag_s: the longest delay of the client itself. load_average: of the machine, before.
        actions: the policy's decisions that were carried out. commit: of the checkout.
    """

    trace: str
    duration_s: float
    governor: str
    repetition: int
    requests: int
    attained: int
    incomplete: int
    failures: list[str]
    tokens_per_s: float
    rank_seconds: float
    sizes: list[tuple[float, int]]
    ttft_s: Quantiles
    itl_s: Quantiles
    client_lag_s: float
    load_average: float
    actions: list[str]
    commit: str = ""

    @property
    def attainment(self) -> float:
        return self.attained / self.requests if self.requests else 1.0


class LiveFigures(msgspec.Struct, kw_only=True):
    """What is written as figures.json. policy: settings that are not the default."""

    invocation: str
    machine: dict[str, Any]
    commit: str
    model: str
    serve: str
    slo: str
    prompt: str
    output: str
    policy: dict[str, float]
    seed: int
    capacities: list[Capacity] = []
    runs: list[LiveRun] = []

    def has(self, trace: str, governor: str, repetition: int) -> bool:
        """Whether this case was run."""
        return any((r.trace, r.governor, r.repetition) == (trace, governor, repetition) for r in self.runs)


def commit() -> str:
    """Of this checkout; ends in "-dirty" where files were changed."""
    name, clean = checkout()
    return f"{name}-dirty" if clean is False else name


def line(run: LiveRun) -> str:
    """One run in short."""
    return (
        f"{run.trace}, {run.governor}: {run.attained} of {run.requests} within the SLO ({run.attainment:.1%}), "
        f"{run.rank_seconds:.0f} rank-seconds, {len(run.sizes) - 1} changes"
    )


def markdown(figures: LiveFigures) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {version}" for name, version in figures.machine["versions"].items())
    load = figures.machine["load_average"][0]
    parts = [
        "# The policy against fixed sizes, on a real server",
        f"Written by `{figures.invocation}` at commit {figures.commit}. Definitions: docs/policy.md.",
        f"- {figures.machine['date']}, {figures.machine['cpu']}, {figures.machine['cores']} cores, "
        f"load average {load} at the start; {versions}\n"
        f"- model: {figures.model}; `elasticmoe serve {figures.serve}`\n"
        f"- SLO: {figures.slo}; prompts of {figures.prompt} tokens, outputs of {figures.output}; seed {figures.seed}\n"
        f"- the policy's settings, where not the default: {', '.join(f'{k} {v:g}' for k, v in figures.policy.items())}",
        "## Capacity, closed loop\n\n" + capacity_table(figures.capacities),
    ]
    if figures.runs:
        parts += ["## Runs\n\n" + runs_table(figures.runs), "## Targets\n\n" + targets_table(figures.runs)]
        parts += ["## What the policy did\n\n" + _actions(figures.runs)]
    return "\n\n".join(parts) + "\n"


def capacity_table(capacities: Sequence[Capacity]) -> str:
    rows = [
        [
            str(c.size), str(c.streams), f"{c.tokens_per_s:.0f}", f"{c.tokens_per_s / capacities[0].tokens_per_s:.2f}",
            _ms(c.itl_s.p50), _ms(c.itl_s.p99), str(c.itl_s.n),
        ]
        for c in capacities
    ]  # fmt: skip
    return table(["ranks", "streams", "tokens/s", "over one rank's", "ITL p50", "ITL p99", "requests"], rows)


def runs_table(runs: Sequence[LiveRun]) -> str:
    """A row for each run."""
    rows = []
    for run in sorted(runs, key=lambda run: (run.trace, run.repetition)):
        most = named(runs, run.trace, "largest fixed", run.repetition)
        rows.append(
            [
                f"{run.trace}, {run.requests} requests in {run.duration_s:.0f} s",
                run.governor,
                f"{run.attainment:.1%}",
                _ms(run.ttft_s.p50),
                _ms(run.ttft_s.p99),
                _ms(run.itl_s.p99),
                str(run.incomplete),
                f"{run.rank_seconds:.0f}",
                "-" if most is None else f"{run.rank_seconds / most.rank_seconds:.2f}",
                str(len(run.sizes) - 1),
            ]
        )
    header = [
        "load", "size chosen by", "attainment", "TTFT p50", "TTFT p99", "ITL p99", "incomplete", "rank-seconds",
        "of the largest's", "changes",
    ]  # fmt: skip
    return table(header, rows)


def targets_table(runs: Sequence[LiveRun]) -> str:
    """The policy against the largest fixed size: medians of the repetitions that have both."""
    rows = []
    for trace in dict.fromkeys(run.trace for run in runs):
        shares = []
        for run in runs:
            most = named(runs, trace, "largest fixed", run.repetition)
            if (run.trace, run.governor) == (trace, "policy") and most is not None and most.attained:
                shares.append((run.attainment / most.attainment, run.rank_seconds / most.rank_seconds))
        if shares:
            attained, cost = (statistics.median(values) for values in zip(*shares, strict=True))
            rows.append(
                [
                    trace,
                    _judged(f"{attained:.3f}", attained >= ATTAIN_SHARE),
                    _judged(f"{cost:.3f}", cost <= COST_SHARE),
                    str(len(shares)),
                ]
            )
    header = [
        "load", f"attainment over the largest's (target {ATTAIN_SHARE})",
        f"rank-seconds over the largest's (target {COST_SHARE})", "n",
    ]  # fmt: skip
    return table(header, rows)


def named(runs: Sequence[LiveRun], trace: str, governor: str, repetition: int) -> LiveRun | None:
    """The run of this case, if it was run."""
    case = (trace, governor, repetition)
    return next((run for run in runs if (run.trace, run.governor, run.repetition) == case), None)


def _actions(runs: Sequence[LiveRun]) -> str:
    told = [
        f"{run.trace}, {run.governor}, run {run.repetition + 1}:\n\n"
        + "\n".join(f"- {action}" for action in run.actions)
        for run in runs
        if run.actions
    ]
    return "\n\n".join(told) or "Nothing."


def _judged(text: str, met: bool) -> str:
    return text if met else f"{text} **missed**"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"
