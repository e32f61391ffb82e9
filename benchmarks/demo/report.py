"""The final output on the terminal: the table, the checks, the paths of the files."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.demo.figures import ChangeFigures, Figures
from elasticmoe_sglang.cpu_bind import OFF
from elasticmoe_sglang.units import format_bytes

_LEGEND = """
total        from the request to the end of the change; streams continue meanwhile
pause        delay of the next batch by the commit (measured by the server)
longest gap  between two tokens around the change, of the stream that came
             closest to its limit; median gap: of that stream over its life
"""


def report(result: Figures) -> RenderableType:
    """The table, the machine and the checks."""
    parts: list[RenderableType] = [table(result), Text(_LEGEND, style="dim")]
    cores, load = result.machine["cores"], result.machine["load_average"][0]
    parts.append(Text(f"{cores} cores, load {load} in the last minute", style="dim"))
    parts.append(Text(cores_sentence(result.settings) + "\n", style="dim"))
    for check in result.checks:
        mark = ("ok    ", "green") if check.passed else ("FAILED", "bold red")
        parts.append(Text.assemble(mark, f"  {check.name}: {check.detail}"))
    parts += [Text(f"        {failure}", style="red") for failure in result.failures[:10]]
    parts += [Text(f"        {row.old} -> {row.new}: {row.error}", style="red") for row in result.changes if row.error]
    return Group(*parts)


def cores_sentence(settings: Mapping[str, object]) -> str:
    """What ranks compute on, and what follows for tokens/s."""
    device, cpu_bind = settings["device"], settings["cpu_bind"]
    if device != "cpu":
        return f"each rank has a device of its own, of SGLang's kind {device}"
    if cpu_bind == OFF:
        return "fewer cores than ranks: they share them, and more ranks do not raise tokens/s"
    return f"each rank has cores of its own: {cpu_bind}"


def table(result: Figures) -> Table:
    """One line per change."""
    # Fits into 80 columns.
    made = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("\nEP size", "\ntotal", "\npause", "longest\ngap", "median\ngap", "columns\nmoved",
                 "bytes\ncopied", "requests\nmoved", "requests\nlost"):  # fmt: skip
        made.add_column(name, justify="right", no_wrap=True)
    for row in result.changes:
        made.add_row(*_cells(row))
    return made


def _cells(row: ChangeFigures) -> list[Text | str]:
    size = f"{row.old} -> {row.new}"
    return [
        Text(size) if row.phase == "done" else Text(f"{size} {row.phase}", style="red"),
        _time(row.total_ms),
        _time(row.pause_ms),
        _time(row.longest_gap_ms),
        _time(row.median_gap_ms),
        str(row.columns_moved),
        format_bytes(row.bytes_moved),
        str(row.moved_requests),
        Text(str(row.lost), style="bold red" if row.lost else ""),
    ]


def _time(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.1f} ms" if milliseconds < 100 else f"{milliseconds / 1000:.2f} s"
