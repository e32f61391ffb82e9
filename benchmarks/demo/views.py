"""The output while the demo runs: a live picture on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from benchmarks.demo.scenario import Progress
from elasticmoe_sglang.cli.render import draw_placement, ranks_table
from elasticmoe_sglang.coordinator.status import Operation, Status

_BARS = "▁▂▃▄▅▆▇█"
_SPARK_BINS = 60
_LIVE_HZ = 3
_LINE_EVERY_S = 4.0
_WAITING_LINE_EVERY_S = 10.0


class PlainView:
    """A line with the time for each event, and a status line at intervals in between."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._next_waiting_s = _WAITING_LINE_EVERY_S

    def say(self, text: str) -> None:
        seconds = time.monotonic() - self._progress.started_at
        self._console.print(f"[{seconds:6.1f} s] {text}", markup=False, highlight=False, soft_wrap=True)

    def waiting(self, seconds: float) -> None:
        if seconds >= self._next_waiting_s:
            self.say(f"the server is starting, {seconds:.0f} s so far")
            self._next_waiting_s += _WAITING_LINE_EVERY_S

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Prints lines while the block runs."""
        ticker = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticker.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_LINE_EVERY_S)
            if any(record.ended_at is None for record in (*self._progress.reference, *self._progress.records)):
                self.say(_summary(self._progress))


class LiveView:
    """A picture that follows the run, below the lines that remain."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console = console
        self._progress = progress
        self._plain = PlainView(console, progress)
        # Its own thread draws, so that drawing does not delay the stamping of tokens more than a thread switch does.
        self._live = Live(
            console=console, get_renderable=self._draw, refresh_per_second=_LIVE_HZ, transient=True,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip

    def say(self, text: str) -> None:
        self._plain.say(text)

    def waiting(self, seconds: float) -> None:
        self._progress.stage = f"the server is starting: {seconds:.0f} s"

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Shows the picture while the block runs."""
        with self._live:
            yield

    def _draw(self) -> RenderableType:
        progress = self._progress
        parts: list[RenderableType] = [Text()]
        status = progress.status
        if status is not None:
            parts.append(_head(status))
            # Side by side where the terminal is wide enough.
            parts.append(
                Columns([ranks_table(status), draw_placement(status.placement, status.copies)], padding=(0, 3))
            )
            parts.append(_throughput(progress))
        parts.append(_stage(progress, status))
        return Padding(Group(*parts), (0, 1))


def _head(status: Status) -> Text:
    return Text.assemble(
        ("EP size ", "dim"), (str(status.ep_size), "bold"), (f" of {status.max_ep_size} ranks", "dim"),
        ("   epoch ", "dim"), (str(status.epoch), "bold"),
        ("   members ", "dim"), ", ".join(map(str, status.membership)),
    )  # fmt: skip


def _throughput(progress: Progress) -> RenderableType:
    rates = progress.rates(_SPARK_BINS)
    now = sum(rates[-2:]) / max(1, len(rates[-2:]))
    grid = Table.grid(padding=(0, 2))
    grid.add_row("tokens/s", Text(sparkline(rates).rjust(_SPARK_BINS), style="cyan"), Text(f"{now:.0f}", style="bold"))
    grid.add_row("streams", _streams(progress))
    return grid


def _stage(progress: Progress, status: Status | None) -> RenderableType:
    operation = status.running if status is not None else None
    clock = (f"{time.monotonic() - progress.started_at:5.1f} s  ", "dim")
    if operation is None:
        return Text.assemble(clock, (progress.stage, "bold"))
    return Text.assemble(clock, (f"{progress.stage}: {_operation(operation)}", "bold yellow"))


def _operation(operation: Operation) -> str:
    columns = f"{operation.columns_moved} of {operation.columns_planned} columns"
    return f"{operation.phase.value}, {columns}. {operation.message}"


def _summary(progress: Progress) -> str:
    rates = progress.rates(int(_LINE_EVERY_S / 0.5))
    status = progress.status
    size = f"EP size {status.ep_size}, epoch {status.epoch}: " if status is not None else ""
    return f"{size}{sum(rates) / max(1, len(rates)):.0f} tokens/s; streams: {_streams(progress)}"


def _streams(progress: Progress) -> str:
    records = [*progress.reference, *progress.records]
    running = sum(record.ended_at is None for record in records)
    complete = sum(record.complete for record in records)
    lost = sum(record.lost for record in records)
    return f"{running} running, {complete} complete, {lost} lost"


def sparkline(values: list[float]) -> str:
    """One block character per value, scaled to the largest."""
    top = max(values, default=0.0)
    if top <= 0:
        return _BARS[0] * len(values)
    return "".join(_BARS[min(len(_BARS) - 1, int(value / top * len(_BARS)))] for value in values)
