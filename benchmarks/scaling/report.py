"""The Markdown report of an experiment. Every number in it is computed here from the runs' figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from benchmarks.scaling.analyser import is_complete
from benchmarks.scaling.experiments import Defaults
from benchmarks.scaling.figures import ChangeFigures, Figures, Rate, Slo
from benchmarks.scaling.records import RunLog


class Result(msgspec.Struct, kw_only=True):
    """One case: its label, its figures, and how many answers differ from those of the reference case."""

    label: str
    method: str
    rate: float
    figures: Figures
    different_outputs: int | None = None
    compared_outputs: int = 0


class Results(msgspec.Struct, kw_only=True):
    """What is written as figures.json."""

    command: str
    title: str
    paper: str
    invocation: str
    machine: dict[str, Any]
    load_average_after: list[float]
    model: str
    workload: str
    slo: Slo
    results: list[Result]


def compare_outputs(log: RunLog, reference: RunLog) -> tuple[int, int]:
    """(answers that differ, answers that both runs completed), request by request."""
    expected = {r.request_id: [t.id for t in r.tokens] for r in reference.requests if is_complete(r)}
    both = [r for r in log.requests if is_complete(r) and r.request_id in expected]
    return sum([t.id for t in r.tokens] != expected[r.request_id] for r in both), len(both)


def describe_workload(d: Defaults) -> str:
    """In one line."""
    kind = "evenly spaced" if d.even else "Poisson"
    rates = "/".join(f"{rate:g}" for rate in d.rates or (d.rate,))
    burst = f", {d.burst_rate:g}/s from {d.burst_at:g} s for {d.burst_s:g} s" if d.burst_rate else ""
    lengths = f"prompts of {d.prompt} words, {d.output} output tokens"
    return f"{kind} arrivals at {rates}/s{burst}; {lengths}; size {d.start}, then {d.changes} (second:size)"


def markdown(results: Results) -> str:
    """The whole report."""
    parts = [
        f"# {results.title}",
        f"Written by `{results.invocation}` on {results.machine['date']}. Definitions: docs/benchmarks.md.",
        f"- compare: {results.paper}\n"
        f"- model: {results.model}\n- workload: {results.workload}\n"
        f"- SLO: first token within {results.slo.ttft_s:g} s, {results.slo.tpot_s * 1e3:g} ms per token after it\n"
        f"- machine: {about_machine(results)}",
        "## Runs\n\n" + runs_table(results.results),
    ]
    if any(result.figures.changes for result in results.results):
        parts.append("## Changes\n\n" + changes_table(results.results))
    if phases := phases_table(results.results):
        parts.append("## What elastic changes did\n\n" + phases)
    if results.command == "scaling":
        parts.append("## Targets\n\n" + targets_table(results.results))
    parts.append("![figures](figures.png)")
    return "\n\n".join(parts) + "\n"


def about_machine(results: Results) -> str:
    """In one line."""
    machine = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB; load average "
        f"{machine['load_average'][0]} before, {results.load_average_after[0]} after; {versions}"
    )


def runs_table(results: Sequence[Result]) -> str:
    header = [
        "run", "requests", "failed", "lost tokens", "doubled", "differ", "TTFT p50 / p99", "TPOT p50 / p99",
        "longest gap p50 / max", "SLO", "goodput /s", "downtime", "device-s", "memory peak",
    ]  # fmt: skip
    rows = []
    for result in results:
        f = result.figures
        differ = "-" if result.different_outputs is None else f"{result.different_outputs}/{result.compared_outputs}"
        rows.append(
            [
                result.label,
                str(f.requests),
                str(f.failed),
                str(f.lost_tokens),
                str(f.duplicated_tokens),
                differ,
                f"{as_ms(f.ttft.p50)} / {as_ms(f.ttft.p99)}",
                f"{as_ms(f.tpot.p50)} / {as_ms(f.tpot.p99)}",
                f"{as_ms(f.max_gaps.p50)} / {as_ms(f.max_gaps.max)}",
                as_percent(f.slo_attainment),
                f"{f.goodput:.2f}",
                as_seconds(f.downtime_s),
                f"{f.device_seconds:.0f}",
                as_gib(f.host_peak_bytes),
            ]
        )
    return table(header, rows)


def changes_table(results: Sequence[Result]) -> str:
    header = [
        "run", "change", "scale latency", "downtime", "tokens/s before / during / after",
        "requests/s before / during / after", "during / before", "longest gap", "memory peak", "device memory peak",
    ]  # fmt: skip
    rows = []
    for result in results:
        for change in result.figures.changes:
            windows = (change.before, change.during, change.after)
            rows.append(
                [
                    result.label,
                    f"{change.old_size} → {change.new_size}",
                    change.error or as_seconds(change.scale_latency_s),
                    as_seconds(change.downtime_s),
                    " / ".join(as_rate(w, w.tokens_per_s, 1) for w in windows),
                    " / ".join(as_rate(w, w.requests_per_s, 2) for w in windows),
                    as_percent(change.during_over_before),
                    as_ms(change.max_gap_s),
                    as_over(change.memory_peak_over_steady),
                    as_over(result.figures.device_peak_over_steady),
                ]
            )
    return table(header, rows)


def phases_table(results: Sequence[Result]) -> str:
    """Where elastic changes spent their time; empty without one."""
    header = [
        "run", "change", "prepare", "commit", "finish", "pause, worst rank", "columns", "copied from devices",
        "read from the checkpoint", "slowest joining rank's weights in place after",
    ]  # fmt: skip
    rows = []
    for result in results:
        for change in result.figures.changes:
            if (timings := change.detail.get("timings")) is None:
                continue
            read, pauses = change.detail.get("checkpoint_bytes"), change.detail["pause_ms"]
            phases = (timings[f"{phase}_ms"] for phase in ("preparing", "committing", "finishing"))
            rows.append(
                [
                    result.label,
                    f"{change.old_size} → {change.new_size}",
                    *("-" if ms is None else as_ms(ms / 1e3) for ms in phases),
                    f"{max(pauses.values()):.1f} ms" if pauses else "-",
                    str(change.detail["columns_moved"]),
                    as_mib(change.detail["bytes_moved"]),
                    as_mib(read),
                    as_ms(change.detail.get("weights_s")),
                ]
            )
    return table(header, rows) if rows else ""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A target of the elastic method, the measured value, and whether the target is met."""

    name: str
    wanted: str
    found: str
    met: bool


def targets(results: Sequence[Result]) -> list[Target]:
    """For `scaling`; empty without an elastic run that changed its size."""
    elastic = next((r.figures for r in results if r.method == "elastic" and r.figures.changes), None)
    if elastic is None:
        return []
    change = elastic.changes[0]
    made = [
        Target(name="downtime", wanted="0", found=as_seconds(elastic.downtime_s), met=elastic.downtime_s == 0),
        Target(name="failed requests", wanted="0", found=str(elastic.failed), met=elastic.failed == 0),
        Target(
            name="throughput during / before",
            wanted="at least 90 %",
            found=as_percent(change.during_over_before),
            met=change.during_over_before is not None and change.during_over_before >= 0.9,
        ),
        _latency_target(change, results),
    ]
    for name, over in (
        ("memory peak, all processes", change.memory_peak_over_steady),
        ("memory peak, devices in the HMM's ledger", elastic.device_peak_over_steady),
    ):
        met = over is not None and over <= 0.02
        made.append(Target(name=name, wanted="at most +2 %", found=as_over(over), met=met))
    return made


def _latency_target(change: ChangeFigures, results: Sequence[Result]) -> Target:
    others = {
        r.label: latency
        for r in results
        if r.method not in ("elastic", "static")
        for latency in [r.figures.changes[0].scale_latency_s if r.figures.changes else None]
        if latency is not None
    }
    wanted = "at most 0.11 of the best other method's"
    if not others or change.scale_latency_s is None:
        return Target(name="scale latency", wanted=wanted, found="nothing to compare with", met=False)
    best = min(others, key=lambda label: others[label])
    share = change.scale_latency_s / others[best]
    found = f"{change.scale_latency_s:.2f} s, {share:.3f} of {best}'s {others[best]:.2f} s"
    return Target(name="scale latency", wanted=wanted, found=found, met=share <= 0.11)


def targets_table(results: Sequence[Result]) -> str:
    rows = [[t.name, t.wanted, t.found, "yes" if t.met else "**no**"] for t in targets(results)]
    return table(["elastic", "wanted", "found", "met"], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def as_ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"


def as_seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.2f} s" if seconds else "0"


def as_rate(window: Rate, rate: float, digits: int) -> str:
    """A rate of a window; "-" where the run ended before the window began."""
    return f"{rate:.{digits}f}" if window.end > window.start else "-"


def as_percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def as_over(share: float | None) -> str:
    return "-" if share is None else f"{share:+.1%}"


def as_mib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 2**20:.0f} MiB"


def as_gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 2**30:.2f} GiB"
