"""The picture of an experiment: tokens a second over time, one repetition of each of its runs with a change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.scaling.analyser import is_complete
from benchmarks.scaling.records import RunLog

_BIN_S = 0.5
_LINE, _CHANGE = "#1f5f8b", "#d1495b"


def draw(logs: Sequence[RunLog], path: Path) -> None:
    """Write the PNG; nothing where no run has a change."""
    shown = list({(log.arm, log.run): log for log in reversed(logs) if log.changes}.values())[::-1]
    if not shown:
        return
    # Slow to import, so only after the runs have ended.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        len(shown), 1, figsize=(10, 1.2 + 1.4 * len(shown)), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, log in zip(all_axes[:, 0], shown, strict=True):
        bins = rates(log)
        axes.step([place * _BIN_S for place in range(len(bins))], bins, where="post", color=_LINE, linewidth=1.4)
        for change in log.changes:
            if change.old_size != change.new_size or change.detail:
                axes.axvspan(change.requested_at, change.ended_at, color=_CHANGE, alpha=0.25, linewidth=0)
        failed = [request.due_at for request in log.requests if not is_complete(request)]
        if failed:  # an empty line that is not clipped has no extent, for which no layout is found
            axes.plot(failed, [0] * len(failed), "x", color="black", markersize=5, clip_on=False)
        axes.set_title(f"{log.arm}: {log.run}, repetition {log.repetition}", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    # Of the figure: as an axis' own they are longer than it, and no layout has room for them.
    figure.supylabel(f"output tokens/s ({_BIN_S:g} s bins)", fontsize=9)
    figure.supxlabel(
        "seconds   (shaded: from the request for a change until it has ended; x: failed request)", fontsize=9
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def rates(log: RunLog) -> list[float]:
    """Tokens per second in each bin of the load."""
    bins = [0] * max(1, int(log.load_ended_at / _BIN_S))
    for request in log.requests:
        for at in request.arrivals:
            if 0 <= at < len(bins) * _BIN_S:
                bins[int(at / _BIN_S)] += 1
    return [count / _BIN_S for count in bins]
