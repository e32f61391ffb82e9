"""The Markdown that is written of results: an experiment's report, and blocks in the README and docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.scaling.experiments import Experiment
from benchmarks.scaling.summary import Results, Row, Stat
from benchmarks.scaling.targets import judge
from elasticmoe_sglang.errors import UserInputError

BEGIN = "<!-- elasticmoe bench report: begin; written by that command, not by hand -->"
END = "<!-- elasticmoe bench report: end -->"


def markdown(results: Results, experiment: Experiment, title: str = "#") -> str:
    """The whole report of an experiment; its headings begin with `title`."""
    parts = [
        f"{title} {results.experiment}: {experiment.title}",
        f"- prompts of {experiment.prompt} words, {experiment.output} output tokens, evenly spaced arrivals\n"
        f"- SLO: first token within {results.slo.ttft_s:g} s, {results.slo.tpot_s * 1e3:g} ms per token after it\n"
        f"- model: {_same(results, 'model')}\n"
        f"- {about_machine(results)}\n"
        f"- answers that differ between runs: {results.differ[0]} of {results.differ[1]}",
        f"{title}# Load\n\n" + runs_table(results.rows),
    ]
    changed = [row for row in results.rows if "tokens_before" in row.stats]
    if changed:
        parts.append(f"{title}# Changes\n\n" + changes_table(changed))
        parts.append(f"{title}# What readers notice\n\n" + notice_table(changed))
    if phases := [row for row in changed if "preparing_s" in row.stats]:
        parts.append(f"{title}# What elastic changes did\n\n" + phases_table(phases))
    if any(verdict.value is not None for verdict in judge(results)):
        parts.append(f"{title}# Targets\n\n" + targets_table([results]))
    return "\n\n".join(parts) + "\n"


def about_machine(results: Results) -> str:
    """In one line; of several sessions, each value that occurred."""
    machines = [about["machine"] for about in results.about.values()]
    first = machines[0]
    loads = [machine["load_average"][0] for machine in machines]
    commits = sorted({f"{m['commit']}{'' if m['tree_clean'] else ' with changes'}" for m in machines})
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    others = [stat.median for row in results.rows if (stat := row.stats.get("others_cores")) is not None]
    busy = f", others used {statistics.median(others):.2f} cores (at most {max(others):.2f})" if others else ""
    return (
        f"{', '.join(sorted({machine['date'] for machine in machines})[:: max(1, len(machines) - 1)])}; commit "
        f"{', '.join(commits)}; {first['cpu']}, {first['cores']} cores, governor {first['governor']}, "
        f"{first['memory_bytes'] / 2**30:.0f} GiB; load average before {min(loads)} to {max(loads)}{busy}; {versions}"
    )


def _same(results: Results, key: str) -> str:
    return " / ".join(sorted({about[key] for about in results.about.values()}))


Cell = Callable[[Row], str]


def _cell(metric: str, show: Callable[[float], str]) -> Cell:
    return lambda row: shown(row.stats.get(metric), show)


def _together(show: Callable[[float], str], *metrics: str) -> Cell:
    """Medians alone, side by side."""

    def cell(row: Row) -> str:
        stats = [row.stats.get(metric) for metric in metrics]
        return " / ".join("-" if stat is None else show(stat.median) for stat in stats)

    return cell


def runs_table(rows: Sequence[Row]) -> str:
    return _table(
        rows,
        {
            "n": lambda row: str(row.stats["failed"].n),
            "capacity, requests/s": _cell("capacity", lambda value: f"{value:.2f}"),
            "tokens/s": _cell("tokens_per_s", lambda value: f"{value:.0f}"),
            "goodput, requests/s": _cell("goodput", lambda value: f"{value:.2f}"),
            "TTFT p50 / p99": _together(as_ms, "ttft_p50_s", "ttft_p99_s"),
            "failed, all": lambda row: f"{sum(row.stats['failed'].values):.0f}",
            "downtime": _cell("run_downtime_s", as_seconds),
            "memory peak": _together(lambda value: f"{value / 2**30:.2f} GiB", "memory_bytes"),
            "cores: servers / client / others": _together(
                lambda value: f"{value:.2f}", "servers_cores", "client_cores", "others_cores"
            ),
        },
    )


def changes_table(rows: Sequence[Row]) -> str:
    return _table(
        rows,
        {
            "scale latency": lambda row: row.error or shown(row.stats.get("scale_latency_s"), as_seconds),
            "until all is done": _cell("total_s", as_seconds),
            "tokens/s before / during / after": _together(
                lambda value: f"{value:.0f}", "tokens_before", "tokens_during", "tokens_after"
            ),
            "gain": _cell("gain", lambda value: f"{value:.2f}"),
            "during / before": _cell("during_over_before", lambda value: f"{value:.2f}"),
            "goodput before / during / after": _together(
                lambda value: f"{value:.1f}", "goodput_before", "goodput_during", "goodput_after"
            ),
            "memory over larger / smaller state": _together(as_over, "memory_over", "memory_over_smaller"),
            "device memory": _together(as_over, "device_memory_over"),
        },
    )


def notice_table(rows: Sequence[Row]) -> str:
    return _table(
        rows,
        {
            "usual gap": _cell("usual_gap_s", as_ms),
            "longest gap of a stream p50 / p99 / max": _together(as_ms, "gap_p50_s", "gap_p99_s", "gap_max_s"),
            "p99 beyond 3 medians + 50 ms": _cell("gap_over_s", as_ms),
            "longest silence": _cell("silence_s", as_ms),
            "TTFT p99 before / arrived during": _together(as_ms, "ttft_before_p99_s", "ttft_during_p99_s"),
            "within the SLO again after": _cell("recovered_s", as_seconds),
        },
    )


def phases_table(rows: Sequence[Row]) -> str:
    return _table(
        rows,
        {
            "preparing": _cell("preparing_s", as_ms),
            "committing": _cell("committing_s", as_ms),
            "finishing": _cell("finishing_s", as_ms),
            "pause, median rank / worst": _together(as_ms, "pause_p50_s", "pause_max_s"),
            "joining weights in place": _cell("weights_s", as_ms),
        },
    )


def targets_table(experiments: Sequence[Results]) -> str:
    rows = [
        [verdict.target.text, verdict.found, verdict.wanted, verdict.outcome]
        for results in experiments
        for verdict in judge(results)
    ]
    return table(["", "median [95 % interval]", "wanted", ""], rows)


def _table(rows: Sequence[Row], columns: dict[str, Cell]) -> str:
    """Columns in which nothing was measured are left out."""
    filled = {name: cells for name, cell in columns.items() if set(cells := [cell(row) for row in rows]) - _EMPTY}
    return table(
        ["run", *filled],
        [[row.name, *(cells[place] for cells in filled.values())] for place, row in enumerate(rows)],
    )


_EMPTY = {"-", "- / -", "- / - / -"}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    made = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*made, *("| " + " | ".join(row) + " |" for row in rows)])


def shown(stat: Stat | None, show: Callable[[float], str]) -> str:
    if stat is None:
        return "-"
    interval = "" if stat.low is None or stat.high is None else f" [{show(stat.low)}, {show(stat.high)}]"
    return show(stat.median) + interval


def as_ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if abs(seconds) < 10 else f"{seconds:.1f} s"


def as_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds else "0"


def as_over(share: float) -> str:
    return f"{share:+.1%}"


def write_block(page: Path, text: str) -> None:
    """Replace what stands between the marks of a page. Raises UserInputError where it has none."""
    head, _, tail = between_marks(page.read_text())
    page.write_text(f"{head}\n{text.strip()}\n{tail}")


def between_marks(text: str) -> tuple[str, str, str]:
    """(before, the block, after) of a page's text. Raises UserInputError: it has no marks."""
    head, begin, rest = text.partition(BEGIN)
    found, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserInputError("the page has no place for the results", hint=f"Add two lines to it: {BEGIN} {END}")
    return head + begin, found.strip(), end + tail
