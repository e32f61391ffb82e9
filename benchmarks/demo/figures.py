"""Computes the figures of a run from its records: one row per change, the checks, and tokens/s over time.

What a client saw is computed from the arrivals of its tokens; what only the server knows (phases, pause, columns,
bytes) comes from the operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarks.demo.scenario import Change, Progress
from benchmarks.streams import GAP_FLOOR_S, GAP_MEDIANS, StreamRecord, WorstGap, worst_gap
from elasticmoe_sglang.coordinator.status import Operation, Phase

RATE_BIN_S = 0.5
PAUSE_MS = 50.0
"""The most that a commit may delay a rank's next batch where four ranks share two cores."""
# A change may affect a stream until this long after the operation has ended.
_AFTER_S = 0.5


class ChangeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One change. Times in milliseconds, except for those since the start of the run.

    Attributes:
        pause_ms: the longest time that a rank took from its last batch before the commit to the first one after it,
            less the median of such intervals.
        longest_gap_ms: the longest time between two tokens of one stream around the change, of the stream that came
            closest to its limit, or furthest beyond it (`WorstGap.limit`); `median_gap_ms` is the median of that same
            stream over its whole life.
        commit_s: when the new membership began to serve.
        streams: that were decoding when the change was asked for.
        moved_requests: migrated from retiring ranks to survivors.
        lost: streams alive during the change that did not end with exactly the tokens asked for.
    """

    old: int
    new: int
    phase: str
    error: str | None
    asked_s: float
    ended_s: float
    commit_s: float | None = None
    total_ms: float | None = None
    preparing_ms: float | None = None
    committing_ms: float | None = None
    finishing_ms: float | None = None
    pause_ms: float | None = None
    longest_gap_ms: float | None = None
    median_gap_ms: float | None = None
    gap_limit_ms: float | None = None
    streams: int = 0
    columns_moved: int = 0
    bytes_moved: int = 0
    moved_requests: int = 0
    lost: int = 0


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A condition that must hold, with the figure that shows it."""

    name: str
    passed: bool
    detail: str


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """A run. `tokens_per_s[i]` covers the seconds from i * `rate_bin_s` on, since the first request was sent."""

    command: str
    machine: dict[str, Any]
    settings: dict[str, object]
    boot_s: float
    duration_s: float
    load_ended_s: float | None
    streams: int
    tokens: int
    changes: list[ChangeFigures]
    checks: list[Check]
    failures: list[str]
    rate_bin_s: float
    tokens_per_s: list[float]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def figures(progress: Progress, command: str, machine: dict[str, Any]) -> Figures:
    """The figures of a finished run on a machine, as `machine.describe` tells of it."""
    everything = [*progress.reference, *progress.records]
    begin = origin(progress)
    end = max((record.ended_at or record.sent_at for record in everything), default=begin)
    settings = progress.settings
    changes = [_change(change, everything, begin) for change in progress.changes]
    return Figures(
        command=command,
        machine=machine,
        settings={
            "sizes": settings.sizes, "ranks": settings.ranks, "streams": settings.streams, "tokens": settings.tokens,
            "experts": settings.experts, "layers": settings.layers, "serve": settings.serve_args(),
            "cpu_bind": settings.cpu_bind, "device": settings.device,
        },
        boot_s=round(progress.boot_s, 1),
        duration_s=round(end - begin, 2),
        load_ended_s=None if progress.load_ended_at is None else round(progress.load_ended_at - begin, 3),
        streams=len(everything),
        tokens=sum(len(record.token_ids) for record in everything),
        changes=changes,
        checks=checks(progress, changes),
        failures=[f"{record.ask.key}: {record.failure}" for record in everything if record.lost] + progress.mismatches,
        rate_bin_s=RATE_BIN_S,
        tokens_per_s=_rates(everything, begin, end),
    )  # fmt: skip


def checks(progress: Progress, changes: Sequence[ChangeFigures]) -> list[Check]:
    """The checks that decide the exit status."""
    everything = [*progress.reference, *progress.records]
    wanted = list(zip(progress.settings.sizes, progress.settings.sizes[1:], strict=False))
    done = [change for change in progress.changes if change.done]
    lost = [record for record in everything if record.lost]
    incomplete = [record for record in everything if not record.complete]
    asked = sum(record.ask.tokens for record in everything)
    got = sum(len(record.token_ids) for record in everything)
    idle = [change for change in progress.changes if _decoding(everything, change.asked_at) == 0]
    mismatches = progress.mismatches
    compared = sum(record.complete for record in progress.records)
    return [
        Check(name="changes done", passed=len(done) == len(wanted), detail=f"{len(done)} of {len(wanted)}"),
        Check(name="changes under load", passed=not idle, detail=f"{len(progress.changes) - len(idle)} with streams"),
        Check(name="requests lost", passed=not lost, detail=f"{len(lost)} of {len(everything)}"),
        Check(name="streams complete", passed=not incomplete and bool(everything),
              detail=f"{len(everything) - len(incomplete)} of {len(everything)}, {got} of {asked} tokens"),
        Check(name="tokens equal to the reference", passed=not mismatches and compared > 0,
              detail=f"{compared - len(mismatches)} of {compared} streams"),
        *_time_checks(changes),
    ]  # fmt: skip


def _time_checks(changes: Sequence[ChangeFigures]) -> list[Check]:
    """Of the change that comes closest to each limit, or furthest beyond it."""
    pauses = [pause for change in changes if (pause := change.pause_ms) is not None]
    gaps = [
        (gap, limit)
        for change in changes
        if (gap := change.longest_gap_ms) is not None and (limit := change.gap_limit_ms) is not None
    ]
    pause = max(pauses, default=math.inf)
    gap, limit = max(gaps, key=lambda pair: pair[0] / pair[1], default=(math.inf, 0.0))
    return [
        Check(name="pause", passed=pause <= PAUSE_MS, detail=f"{pause:.1f} ms, at most {PAUSE_MS:g}"),
        Check(name="longest gap", passed=gap <= limit,
              detail=f"{gap:.0f} ms, at most {limit:.0f} ({GAP_MEDIANS} medians, or {GAP_FLOOR_S * 1e3:.0f} ms)"),
    ]  # fmt: skip


def origin(progress: Progress) -> float:
    """When the first request was sent: second 0 of all figures."""
    return min((record.sent_at for record in progress.reference), default=progress.started_at)


def _change(change: Change, records: list[StreamRecord], begin: float) -> ChangeFigures:
    ended_at = change.ended_at if change.ended_at is not None else change.asked_at
    until = ended_at + _AFTER_S
    worst = _worst_gap(records, change.asked_at, until)
    around = [record for record in records if record.sent_at < until and (record.ended_at or until) > change.asked_at]
    row = ChangeFigures(
        old=change.old,
        new=change.new,
        phase="error",
        error=change.error,
        asked_s=round(change.asked_at - begin, 3),
        ended_s=round(ended_at - begin, 3),
        longest_gap_ms=None if worst is None else worst.longest * 1e3,
        median_gap_ms=None if worst is None else worst.median * 1e3,
        gap_limit_ms=None if worst is None else worst.limit * 1e3,
        streams=_decoding(records, change.asked_at),
        lost=sum(record.lost for record in around),
    )
    if change.operation is None:
        return row
    return _with_operation(row, change.operation)


def _with_operation(row: ChangeFigures, operation: Operation) -> ChangeFigures:
    timings = operation.timings
    return msgspec.structs.replace(
        row,
        phase=operation.phase.value,
        error=operation.error,
        commit_s=_commit_s(row.asked_s, operation),
        total_ms=timings.total_ms,
        preparing_ms=timings.preparing_ms,
        committing_ms=timings.committing_ms,
        finishing_ms=timings.finishing_ms,
        pause_ms=operation.max_pause_ms,
        columns_moved=operation.columns_moved,
        bytes_moved=operation.bytes_moved,
        moved_requests=operation.moved_requests,
    )


def _commit_s(asked_s: float, operation: Operation) -> float | None:
    spent = operation.timings
    before = (spent.planned_ms, spent.preparing_ms, spent.committing_ms)
    if operation.phase is not Phase.DONE or None in before:
        return None
    return round(asked_s + sum(part or 0.0 for part in before) / 1e3, 3)


def _worst_gap(records: Sequence[StreamRecord], since: float, until: float) -> WorstGap | None:
    found = [gap for record in records if (gap := worst_gap(record.gaps(), since, until)) is not None]
    return max(found, key=lambda gap: gap.over_limit, default=None)


def _decoding(records: list[StreamRecord], at: float) -> int:
    return sum(bool(record.arrivals) and record.arrivals[0] <= at < record.arrivals[-1] for record in records)


def _rates(records: list[StreamRecord], begin: float, end: float) -> list[float]:
    counts = [0] * (int((end - begin) / RATE_BIN_S) + 1)
    for record in records:
        for at in record.arrivals:
            counts[int((at - begin) / RATE_BIN_S)] += 1
    return [count / RATE_BIN_S for count in counts]
