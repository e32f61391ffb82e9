"""A progress bar that follows the phases of an operation."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from elasticmoe_sglang.coordinator.status import Operation, Phase
from elasticmoe_sglang.units import format_bytes

# Percentage at the start of each phase; preparing takes most of the time.
_BEGINS = {Phase.PLANNED: 0, Phase.PREPARING: 5, Phase.COMMITTING: 80, Phase.FINISHING: 90, Phase.DONE: 100}


class OperationProgress:
    """Context manager; call `show` with each new state of the operation. Draws on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.fields[phase]:<11}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console or Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=100, phase="", detail="")

    def __enter__(self) -> OperationProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, operation: Operation) -> None:
        """Draw the progress of the operation; a failed operation leaves the bar where it was."""
        detail = (
            f"EP {operation.old_ep_size} -> {operation.new_ep_size}, "
            f"{operation.columns_moved}/{operation.columns_planned} columns, {format_bytes(operation.bytes_moved)}"
        )
        self._progress.update(self._task, phase=operation.phase.value, detail=detail)
        completed = completion(operation)
        if completed is not None:
            self._progress.update(self._task, completed=completed)


def completion(operation: Operation) -> float | None:
    """Percentage done, by columns while preparing; None for a failed operation."""
    begins = _BEGINS.get(operation.phase)
    if begins is None or operation.phase is not Phase.PREPARING or not operation.columns_planned:
        return begins
    share = operation.columns_moved / operation.columns_planned
    return begins + share * (_BEGINS[Phase.COMMITTING] - begins)
