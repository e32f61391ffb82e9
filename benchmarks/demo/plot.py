"""The picture of a run: tokens/s over time, and every gap between two tokens, with the changes marked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.demo.figures import Figures, origin
from benchmarks.demo.scenario import Progress

_RATE = "#1f5f8b"
_CHANGE = "#d1495b"
_SIZES = ("#f3f6f9", "#e3ebf2")
_PLATE = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5}


def draw(progress: Progress, result: Figures, path: Path) -> None:
    """Write the PNG."""
    # Slow to import, so only after the streams have ended.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(11, 6.4), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    _rate(top, result)
    _gaps(bottom, progress, result)
    for axes in (top, bottom):
        _mark_changes(axes, result)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="white", linewidth=1)
        axes.set_axisbelow(True)
        axes.set_xlim(0, result.duration_s)
    _name_sizes(top, result)
    lost = sum(record.lost for record in (*progress.reference, *progress.records))
    figure.suptitle(
        f"{result.streams} streams, {result.tokens} tokens, EP size "
        f"{' → '.join(map(str, progress.settings.sizes))}: {lost} requests lost",
        fontsize=13,
    )
    cores = result.machine["cores"]
    bottom.set_xlabel(
        f"seconds since the first request   ({cores} CPU cores; SGLang {result.machine['versions']['sglang']})"
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _rate(axes: Any, result: Figures) -> None:
    width = result.rate_bin_s
    # The last bin is not full.
    rates = result.tokens_per_s[:-1]
    axes.step([(i + 0.5) * width for i in range(len(rates))], rates, where="mid", color=_RATE, linewidth=1.6)
    axes.set_ylabel(f"tokens/s, all streams ({width:g} s bins)")
    axes.set_ylim(0, max(rates, default=1.0) * 1.25)
    if result.load_ended_s is not None:
        axes.annotate(
            "no new streams",
            (result.load_ended_s, 0.7),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            color="dimgray",
        )
        axes.axvline(result.load_ended_s, color="dimgray", linewidth=1, linestyle=":")


def _gaps(axes: Any, progress: Progress, result: Figures) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    begin = origin(progress)
    gaps = [(at - begin, gap * 1e3) for record in (*progress.reference, *progress.records) for at, gap in record.gaps()]
    # Tokens of one event arrive together; on a logarithmic axis they have no place.
    shown = [(at, gap) for at, gap in gaps if gap > 0.1]
    axes.plot([at for at, _ in shown], [gap for _, gap in shown], ".", color=_RATE, markersize=2, alpha=0.35)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylabel("gap between two tokens\nof one stream (ms)")
    for change in result.changes:
        if change.longest_gap_ms is not None:
            axes.annotate(
                f"{change.longest_gap_ms:.0f} ms",
                ((change.asked_s + change.ended_s) / 2, change.longest_gap_ms),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=_CHANGE,
                bbox=_PLATE,
            )
    axes.set_ylim(bottom=3)
    axes.legend(
        handles=[
            Patch(color=_CHANGE, alpha=0.2, label="a change is prepared; streams continue"),
            Line2D([], [], color=_CHANGE, linewidth=1.2, label="commit: the new size serves"),
        ],
        loc="upper right",
        fontsize=8,
        framealpha=0.9,
    )


def _mark_changes(axes: Any, result: Figures) -> None:
    begins = [0.0, *(change.ended_s for change in result.changes)]
    ends = [*(change.asked_s for change in result.changes), result.duration_s]
    for index, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        axes.axvspan(begin, end, color=_SIZES[index % 2], zorder=0, linewidth=0)
    for change in result.changes:
        axes.axvspan(change.asked_s, change.ended_s, color=_CHANGE, alpha=0.2, zorder=0, linewidth=0)
        if change.commit_s is not None:
            axes.axvline(change.commit_s, color=_CHANGE, linewidth=1.2)


def _name_sizes(axes: Any, result: Figures) -> None:
    """EP size above each stretch, and each change with its time."""
    level = axes.get_xaxis_transform()
    first = result.changes[0].old if result.changes else None
    sizes = [first, *(change.new if change.phase == "done" else change.old for change in result.changes)]
    begins = [0.0, *(change.ended_s for change in result.changes)]
    ends = [*(change.asked_s for change in result.changes), result.duration_s]
    for size, begin, end in zip(sizes, begins, ends, strict=True):
        axes.text((begin + end) / 2, 0.95, f"EP {size}", transform=level, ha="center", va="top", fontsize=11)
    for change in result.changes:
        took = f"{change.total_ms / 1e3:.2f} s" if change.total_ms is not None else change.phase
        label = f"{change.old} → {change.new}\n{took}"
        middle = (change.asked_s + change.ended_s) / 2
        axes.text(middle, 0.87, label, transform=level, ha="center", va="top", fontsize=9, color=_CHANGE, bbox=_PLATE)
