"""From the figures of repeated runs to one row each: medians with 95 % intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from benchmarks.scaling.analyser import analyse, present
from benchmarks.scaling.experiments import Experiment
from benchmarks.scaling.figures import ChangeFigures, Figures, Slo
from benchmarks.scaling.methods import MethodFailed
from benchmarks.scaling.records import RunLog
from benchmarks.scaling.runner import capacity_of

_RESAMPLES = 2000


class Stat(msgspec.Struct, frozen=True, kw_only=True):
    """A figure over n repetitions: the median, and a 95 % bootstrap interval of it (None with fewer than three)."""

    n: int
    median: float
    low: float | None = None
    high: float | None = None
    values: list[float] = []


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One run of one arm. `name` is "ARM: RUN", with the direction where a run has changes up and down.

    Attributes:
        error: why a change did not come about, of the last repetition in which one did not.
    """

    name: str
    method: str
    stats: dict[str, Stat]
    error: str | None = None


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What is written as figures.json.

    Attributes:
        about: of each session (arm and repetition): machine, commit, load before, model, command.
        differ: completed answers that differ from those of the first arm to the same request, of all compared.
    """

    experiment: str
    slo: Slo
    rows: list[Row]
    about: dict[str, dict[str, Any]]
    differ: tuple[int, int]

    def stat(self, row: str, metric: str) -> Stat | None:
        return next((each.stats.get(metric) for each in self.rows if each.name == row), None)


def summarise(name: str, experiment: Experiment, logs: Sequence[RunLog]) -> Results:
    """Rows in the order of the experiment's arms and runs."""
    order = {(arm.name, run.name): place for place, (arm, run) in enumerate(
        (arm, run) for arm in experiment.arms for run in arm.runs
    )}  # fmt: skip
    ordered = sorted(logs, key=lambda log: (order[log.arm, log.run], log.repetition))
    found: dict[str, list[dict[str, float | None]]] = {}
    methods: dict[str, str] = {}
    errors: dict[str, str] = {}
    for log in ordered:
        figures = analyse(log, experiment.slo, window_s=experiment.window_s)
        for row, metrics, error in _rows(log, figures):
            found.setdefault(row, []).append(metrics)
            methods[row] = log.method
            if error is not None:
                errors[row] = error
    return Results(
        experiment=name,
        slo=experiment.slo,
        rows=[
            Row(name=row, method=methods[row], stats=_stats(metrics), error=errors.get(row))
            for row, metrics in found.items()
        ],
        about={f"{log.arm}, repetition {log.repetition}": log.about for log in ordered},
        differ=_compare(ordered),
    )


def _rows(log: RunLog, figures: Figures) -> list[tuple[str, dict[str, float | None], str | None]]:
    name = f"{log.arm}: {log.run}"
    whole = _of_run(log, figures)
    if not figures.changes:
        return [(name, whole, None)]
    directions = {change.new_size > change.old_size for change in figures.changes}
    return [
        (
            name if len(directions) == 1 else f"{name}, {'up' if change.new_size > change.old_size else 'down'}",
            whole | _of_change(change),
            change.error,
        )
        for change in figures.changes
    ]


def _capacity(log: RunLog) -> float | None:
    try:
        return capacity_of(log)
    except MethodFailed:  # too few requests ended
        return None


def _of_run(log: RunLog, figures: Figures) -> dict[str, float | None]:
    closed = log.load.lanes is not None and not figures.changes
    return {
        "capacity": _capacity(log) if closed else None,
        "tokens_per_s": figures.served.tokens_per_s,
        "goodput": figures.served.goodput,
        "slo_attainment": figures.slo_attainment,
        "ttft_p50_s": figures.ttft.p50,
        "ttft_p99_s": figures.ttft.p99,
        "tpot_p50_s": figures.tpot.p50,
        "failed": float(figures.failed),
        "lost_tokens": float(figures.lost_tokens),
        "run_downtime_s": figures.downtime_s,
        "memory_bytes": None if figures.memory_bytes is None else float(figures.memory_bytes),
        "device_memory_over": figures.device_memory_over,
        **{f"{who}_cores": share for who, share in log.busy_cores.items()},
    }


def _of_change(change: ChangeFigures) -> dict[str, float | None]:
    timings = change.detail.get("timings") or {}
    before, during = change.ttft_before.p99, change.ttft_during.p99
    return {
        "scale_latency_s": change.scale_latency_s,
        "total_s": change.total_s,
        "downtime_s": change.downtime_s,
        **{f"tokens_{when}": getattr(change, when).tokens_per_s for when in ("before", "during", "after")},
        **{f"goodput_{when}": getattr(change, when).goodput for when in ("before", "during", "after")},
        "gain": change.gain,
        "during_over_before": change.during_over_before,
        "usual_gap_s": change.usual_gap_s,
        "gap_p50_s": change.gaps.p50,
        "gap_p99_s": change.gaps.p99,
        "gap_max_s": change.gaps.max,
        "gap_over_s": change.gap_over_s,
        "worst_gap_over_limit": change.worst_gap_over_limit,
        "silence_s": change.silence_s,
        "ttft_before_p99_s": before,
        "ttft_during_p99_s": during,
        "ttft_during_over_before": during / before if before and during is not None else None,
        "recovered_s": change.recovered_s,
        "pause_p50_s": statistics.median(change.pause_ms) / 1e3 if change.pause_ms else None,
        "pause_max_s": max(change.pause_ms) / 1e3 if change.pause_ms else None,
        "memory_over": change.memory_over,
        "memory_over_smaller": change.memory_over_smaller,
        "weights_s": change.detail.get("weights_s"),
        **{f"{phase}_s": _seconds(timings.get(f"{phase}_ms")) for phase in ("preparing", "committing", "finishing")},
    }


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _stats(metrics: Sequence[Mapping[str, float | None]]) -> dict[str, Stat]:
    values = {name: present(each.get(name) for each in metrics) for name in metrics[0]}
    return {name: stat(found) for name, found in values.items() if found}


def stat(values: Sequence[float]) -> Stat:
    """The interval's resamples have a fixed seed: the same values give the same interval."""
    low = high = None
    if len(values) >= 3:
        drawn = np.random.default_rng(0).choice(np.asarray(values), size=(_RESAMPLES, len(values)))
        low, high = (float(edge) for edge in np.percentile(np.median(drawn, axis=1), (2.5, 97.5)))
    return Stat(n=len(values), median=float(statistics.median(values)), low=low, high=high, values=list(values))


def _compare(logs: Sequence[RunLog]) -> tuple[int, int]:
    """(answers that differ, answers compared): equal seeds ask the same, whatever the method and the load."""
    expected: dict[tuple[int, int], list[int]] = {}
    differ = compared = 0
    for log in logs:
        for request in log.requests:
            if request.error is not None:
                continue
            key = (log.repetition, request.request_id)
            if key not in expected:
                expected[key] = request.token_ids
                continue
            compared += 1
            differ += request.token_ids != expected[key]
    return differ, compared
