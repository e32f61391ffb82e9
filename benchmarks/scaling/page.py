"""The generated block of docs/benchmarks.md: written from the figures of `elasticmoe bench scaling`, never by hand."""

from __future__ import annotations

import os
import re
from pathlib import Path

from benchmarks.scaling.report import (
    Result,
    Results,
    about_machine,
    as_gib,
    as_ms,
    as_over,
    as_percent,
    as_rate,
    as_seconds,
    table,
    targets_table,
)
from elasticmoe_sglang.errors import UserInputError

BEGIN = "<!-- elasticmoe bench scaling: begin; written by the command below with --page, not by hand -->"
END = "<!-- elasticmoe bench scaling: end -->"

# Where the block was written to is no part of how the figures came about.
_PAGE_OPTION = re.compile(r" --(?:page|readme)[ =]\S+")


def block(results: Results, picture: str) -> str:
    """The lines between the marks.

    Args:
        picture: path of the PNG, relative to the page.
    """
    parts = [
        f"```\n{_PAGE_OPTION.sub('', results.invocation)}\n```",
        f"![{results.title}]({picture})",
        _table(results.results),
        targets_table(results.results),
        f"{results.machine['date']}, {about_machine(results)}. Model: {results.model}. Load: {results.workload}.",
    ]
    return "\n\n".join(parts)


def _table(results: list[Result]) -> str:
    header = [
        "method", "scale latency", "downtime", "requests failed", "longest gap p50 / max", "within SLO",
        "tokens/s before / during / after", "during / before", "memory peak, over steady", "device-s",
    ]  # fmt: skip
    rows = []
    for result in results:
        f = result.figures
        change = next(iter(f.changes), None)
        windows = (change.before, change.during, change.after) if change else (f.throughput,)
        rows.append(
            [
                result.label,
                (change.error or as_seconds(change.scale_latency_s)) if change else "-",
                as_seconds(f.downtime_s),
                f"{f.failed} of {f.requests}",
                f"{as_ms(f.max_gaps.p50)} / {as_ms(f.max_gaps.max)}",
                as_percent(f.slo_attainment),
                " / ".join(as_rate(window, window.tokens_per_s, 1) for window in windows),
                as_percent(change.during_over_before) if change else "-",
                f"{as_gib(f.host_peak_bytes)}, {as_over(change.memory_peak_over_steady if change else None)}",
                f"{f.device_seconds:.0f}",
            ]
        )
    return table(header, rows)


def between_marks(text: str) -> tuple[str, str, str]:
    """(before, the block, after) of a page's text.

    Raises:
        UserInputError: it has no marks.
    """
    head, begin, rest = text.partition(BEGIN)
    found, end, tail = rest.partition(END)
    if not begin or not end:
        raise UserInputError("the page has no place for the table", hint=f"Add two lines to it: {BEGIN} {END}")
    return head + begin, found.strip(), end + tail


def write(page: Path, results: Results, picture: Path) -> None:
    """Replace the block in `page`. Raises UserInputError without marks."""
    head, _, tail = between_marks(page.read_text())
    shown = Path(os.path.relpath(picture.resolve(), page.resolve().parent)).as_posix()
    page.write_text(f"{head}\n{block(results, shown)}\n{tail}")
