"""The pictures of an experiment, drawn from its logs and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.scaling.analyser import is_complete
from benchmarks.scaling.records import RunLog
from benchmarks.scaling.report import Result

_COLOURS = {
    "elastic": "#1f5f8b",
    "cold-restart": "#d1495b",
    "replica": "#66a182",
    "colocated": "#edae49",
    "static": "#777777",
}


_SHOWN_S = 140
"""One run that takes minutes must not squeeze the others to nothing; its headline has its figures."""


def draw(command: str, results: Sequence[Result], logs: Sequence[RunLog], path: Path) -> None:
    """Write the PNG of one experiment."""
    # Slow to import, so only after the runs have ended.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if command == "slo":
        figure = _attainment(pyplot, results)
    elif command == "table1":
        figure = _latencies(pyplot, results)
    else:
        figure = _timelines(pyplot, results, logs)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def tokens_per_second(log: RunLog) -> list[int]:
    """Tokens that arrived in each whole second of the load."""
    bins = [0] * max(1, int(log.load_ended_at))
    for request in log.requests:
        for token in request.tokens:
            if 0 <= token.at < len(bins):
                bins[int(token.at)] += 1
    return bins


def _demand(log: RunLog) -> float:
    """Tokens per second that were asked for, on average."""
    return sum(request.wanted for request in log.requests) / max(log.load_ended_at, 1.0)


def _timelines(pyplot: Any, results: Sequence[Result], logs: Sequence[RunLog]) -> Any:
    height = 1.2 + 1.6 * len(logs)
    figure, all_axes = pyplot.subplots(
        len(logs), 1, figsize=(10, height), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes, result, log in zip(all_axes[:, 0], results, logs, strict=True):
        bins = tokens_per_second(log)
        axes.axhline(_demand(log), color="black", linewidth=0.7, linestyle=":")
        axes.step(range(len(bins)), bins, where="post", color=_COLOURS[log.method], linewidth=1.5)
        for change in log.changes:
            end = change.effective_at or change.ended_at
            axes.axvspan(change.requested_at, end, color=_COLOURS[log.method], alpha=0.18, linewidth=0)
        failed = [request.due_at for request in log.requests if not is_complete(request)]
        if failed:
            axes.plot(failed, [0] * len(failed), "x", color="black", markersize=5, clip_on=False)
        axes.set_title(_headline(result), fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, min(_SHOWN_S, max(len(tokens_per_second(each)) for each in logs)))
    # Once all is drawn: the axes share their limits, and setting one ends the fitting of the other to what follows. A
    # server that catches up after a stall serves many times the usual rate for a second; that may leave the picture.
    usual = max(_demand(log) for log in logs)
    all_axes[0, 0].set_ylim(0, min(all_axes[0, 0].get_ylim()[1], 2 * usual))
    all_axes[len(logs) // 2, 0].set_ylabel("output tokens/s")
    all_axes[-1, 0].set_xlabel(
        "seconds   (shaded: change asked for until the new size serves; dotted: tokens asked for; x: failed request)"
    )
    return figure


def _headline(result: Result) -> str:
    f = result.figures
    latencies = [change.scale_latency_s for change in f.changes if change.scale_latency_s is not None]
    scaled = f", scale latency {', '.join(f'{latency:.1f} s' for latency in latencies)}" if latencies else ""
    scaled += "".join(f", {change.error}" for change in f.changes if change.error)
    return f"{result.label}{scaled}, downtime {f.downtime_s:.1f} s, {f.failed} of {f.requests} requests failed"


def _attainment(pyplot: Any, results: Sequence[Result]) -> Any:
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for method in dict.fromkeys(result.method for result in results):
        points = sorted((r.rate, 100 * (r.figures.slo_attainment or 0)) for r in results if r.method == method)
        axes.plot(*zip(*points, strict=True), marker="o", color=_COLOURS[method], label=method)
    axes.set_xlabel("requests/s")
    axes.set_ylabel("requests within the SLO, %")
    axes.set_ylim(0, 103)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _latencies(pyplot: Any, results: Sequence[Result]) -> Any:
    figure, axes = pyplot.subplots(figsize=(7, 0.8 + 0.5 * len(results)), layout="constrained")
    values = [r.figures.changes[0].scale_latency_s or 0.0 if r.figures.changes else 0.0 for r in results]
    bars = axes.barh([r.label for r in results], values, color=_COLOURS["elastic"])
    axes.bar_label(bars, fmt="%.2f s", padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("scale latency, seconds")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
