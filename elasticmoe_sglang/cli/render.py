"""Status and operations as tables and drawings for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from elasticmoe_sglang.coordinator.status import DeviceMemory, MemoryStatus, Operation, Phase, RankState, Status
from elasticmoe_sglang.cpu_bind import format_cores
from elasticmoe_sglang.units import format_bytes

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")
_RANK_STYLES = {
    RankState.ACTIVE: "green",
    RankState.HOT: "bright_cyan",
    RankState.STANDBY: "cyan",
    RankState.STARTING: "yellow",
    RankState.JOINING: "yellow",
    RankState.RETIRING: "yellow",
    RankState.INACTIVE: "dim",
}
_PHASE_STYLES = {Phase.DONE: "green", Phase.FAILED: "bold red", Phase.ROLLED_BACK: "red"}
_BAR = 20
_DRAWING_WIDTH = 64


def status_view(status: Status) -> RenderableType:
    """Ranks, placement, memory and the latest operation."""
    head = Text.assemble(
        ("EP size ", "dim"), (str(status.ep_size), "bold"), (f" of {status.max_ep_size} ranks", "dim"),
        ("   epoch ", "dim"), (str(status.epoch), "bold"),
        ("   members ", "dim"), ", ".join(map(str, status.membership)),
    )  # fmt: skip
    parts: list[RenderableType] = [head, ranks_table(status), draw_placement(status.placement, status.copies)]
    parts.append(memory_view(status.memory))
    latest = status.running or status.last
    parts.append(operation_panel(latest) if latest is not None else Text("no change so far", style="dim"))
    return Group(*parts)


def ranks_table(status: Status) -> Table:
    """One row per rank, with its number of columns and its KV tokens."""
    table = Table(
        "rank",
        "state",
        "device",
        "pid",
        "columns",
        "KV tokens",
        "in use",
        "cached",
        title="ranks",
        title_justify="left",
    )
    for rank in status.ranks:
        table.add_row(
            str(rank.rank),
            Text(rank.state.value, style=_RANK_STYLES[rank.state]),
            str(rank.device) if rank.cores is None else f"{rank.device} (cores {format_cores(rank.cores)})",
            str(rank.pid) if rank.pid is not None else "-",
            _columns(status, rank.rank),
            *("-" if tokens is None else str(tokens) for tokens in (rank.kv_tokens, rank.kv_used, rank.kv_cached)),
        )
    return table


def _columns(status: Status, rank: int) -> str:
    copies = sum(rank in ranks for ranks in status.copies.values())
    return f"{status.placement.count(rank)} + {copies}" if copies else str(status.placement.count(rank))


def draw_placement(placement: Sequence[int], copies: Mapping[int, Sequence[int]] | None = None) -> RenderableType:
    """One character per expert column: the number of its rank, in the rank's colour; below it the columns with copies
    and their other ranks."""
    text = Text()
    for column, rank in enumerate(placement):
        if column and column % _DRAWING_WIDTH == 0:
            text.append("\n")
        # Ranks from 10 on are letters.
        text.append(_digit(rank), style=_COLOURS[rank % len(_COLOURS)])
    for column, ranks in sorted((copies or {}).items()):
        text.append(f"\ncolumn {column}: also on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}")
    return Panel(text, title=f"rank of each of {len(placement)} expert columns", title_align="left", expand=False)


def memory_view(memory: MemoryStatus) -> RenderableType:
    """One row per device with its budget; the title names the HMM."""
    if not memory.available:
        return Text(f"HMM: {memory.error}", style="red")
    kinds = sorted({kind for device in memory.devices for kind in device.by_kind})
    title = f"memory (HMM pid {memory.pid}, {memory.endpoint})"
    table = Table("device", "used", "of budget", *kinds, "peak", title=title, title_justify="left")
    for device in memory.devices:
        table.add_row(
            str(device.device),
            format_bytes(device.used),
            _bar(device),
            *(format_bytes(device.by_kind.get(kind, 0)) for kind in kinds),
            format_bytes(device.peak),
        )
    return table


def operations_table(operations: Sequence[Operation]) -> RenderableType:
    """One row per operation, in the given order."""
    if not operations:
        return Text("no change so far", style="dim")
    table = Table("operation", "phase", "EP", "total", "pause", "columns", "bytes", "error")
    for operation in operations:
        table.add_row(
            operation.operation_id,
            _phase(operation),
            sizes(operation),
            milliseconds(operation.timings.total_ms),
            milliseconds(operation.max_pause_ms),
            f"{operation.columns_moved}/{operation.columns_planned}",
            format_bytes(operation.bytes_moved),
            operation.error or "",
        )
    return table


def operation_panel(operation: Operation) -> RenderableType:
    """All details of one operation."""
    timings = operation.timings
    grid = Table.grid(padding=(0, 2))
    grid.add_row("phase", _phase(operation))
    grid.add_row("EP size", f"{sizes(operation)} (epoch {operation.epoch})")
    if operation.serving_epoch not in (None, operation.epoch):
        grid.add_row("serving", f"epoch {operation.serving_epoch}")
    for name, ranks in (("joining", operation.joining), ("retiring", operation.retiring)):
        if ranks:
            grid.add_row(name, "ranks " + ", ".join(map(str, ranks)))
    moved = f"{operation.columns_moved} of {operation.columns_planned}, {format_bytes(operation.bytes_moved)}"
    grid.add_row("columns moved", moved)
    if operation.moved_requests:
        again = f", the KV of {operation.recomputed_requests} is recomputed" if operation.recomputed_requests else ""
        grid.add_row("requests moved", f"{operation.moved_requests}{again}")
    grown = [f"{format_bytes(d.before)} -> {format_bytes(d.after)}" for d in operation.memory if d.before or d.after]
    if grown:
        grid.add_row("devices", ", ".join(grown))
        grid.add_row("peak", ", ".join(format_bytes(d.peak) for d in operation.memory if d.before or d.after))
    for name, value in (
        ("prepare", timings.preparing_ms),
        ("commit", timings.committing_ms),
        ("finish", timings.finishing_ms),
        ("total", timings.total_ms),
        ("longest pause", operation.max_pause_ms),
    ):
        if value is not None:
            grid.add_row(name, milliseconds(value))
    grid.add_row("", operation.message)
    if operation.error:
        grid.add_row("error", Text(operation.error, style="red"))
    return Panel(grid, title=f"operation {operation.operation_id}", title_align="left", expand=False)


def sizes(operation: Operation) -> str:
    """From which EP size to which."""
    if operation.rebalances:
        return f"{operation.new_ep_size}, rebalanced"
    return f"{operation.old_ep_size} -> {operation.new_ep_size}"


def _phase(operation: Operation) -> Text:
    return Text(operation.phase.value, style=_PHASE_STYLES.get(operation.phase, "yellow"))


def milliseconds(value: float | None) -> str:
    """Milliseconds as a short text; None as a dash."""
    if value is None:
        return "-"
    return f"{value:.1f} ms" if value < 1000 else f"{value / 1000:.2f} s"


def _bar(device: DeviceMemory) -> Text:
    share = device.used / device.budget
    filled = min(_BAR, round(share * _BAR))
    style = "red" if share > 0.97 else "green"
    return Text.assemble(
        ("█" * filled, style), ("░" * (_BAR - filled), "dim"), f" {share:4.0%} of {format_bytes(device.budget)}"
    )


def _digit(rank: int) -> str:
    return "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[rank % 62]
