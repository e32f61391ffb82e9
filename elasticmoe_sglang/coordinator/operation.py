"""One operation while it lives: its phase, its clock and its counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec

from elasticmoe_sglang.coordinator.ports import CommitReport, PullReport
from elasticmoe_sglang.coordinator.status import DevicePeak, MemoryStatus, Move, Operation, Phase, Timings
from elasticmoe_sglang.planner import RetireRanks, ScalePlan, ScaleTo, Target

_NEXT: dict[Phase, tuple[Phase, ...]] = {
    Phase.PLANNED: (Phase.PREPARING, Phase.DONE, Phase.ROLLED_BACK),
    Phase.PREPARING: (Phase.COMMITTING, Phase.ROLLED_BACK, Phase.FAILED),
    Phase.COMMITTING: (Phase.FINISHING, Phase.ROLLED_BACK, Phase.FAILED),
    Phase.FINISHING: (Phase.DONE, Phase.FAILED),
}

_MESSAGES: dict[Phase, str] = {
    Phase.PLANNED: "The change is planned.",
    Phase.PREPARING: "Ranks boot and pull their columns; serving goes on.",
    Phase.COMMITTING: "All ranks meet between two batches.",
    Phase.FINISHING: "The new membership serves; old columns are given back.",
    Phase.DONE: "The change is done.",
    Phase.FAILED: "The change failed and needs a look; `error` says what holds now.",
    Phase.ROLLED_BACK: "The change was undone; the server goes on as before it.",
}


class RunningOperation:
    """Mutable record of one change; `view()` is the immutable picture that others see."""

    def __init__(self, operation_id: str, target: Target, plan: ScalePlan, started: float) -> None:
        self.operation_id = operation_id
        self.target = target
        self.plan = plan
        self.phase = Phase.PLANNED
        self.error: str | None = None
        self.ended = asyncio.Event()
        self._created_at = time.time()
        self._started = self._phase_started = started
        self._spent: dict[Phase, float] = {}
        self._pulled: list[PullReport] = []
        self._commit: CommitReport | None = None
        self._moved = 0
        self._memory: list[DevicePeak] = []

    def advance(self, phase: Phase) -> None:
        """Enter the next phase; the clock of the last one stops."""
        assert phase in _NEXT.get(self.phase, ()), f"{self.phase} -> {phase}"
        now = time.monotonic()
        self._spent[self.phase] = now - self._phase_started
        self.phase, self._phase_started = phase, now
        if phase.ended:
            self.ended.set()

    def end(self, phase: Phase, error: str | None = None) -> None:
        """The last phase, and why if it is a bad one."""
        self.error = error
        self.advance(phase)

    def add_pull(self, report: PullReport) -> None:
        """Count columns that arrived."""
        self._pulled.append(report)

    def set_commit(self, report: CommitReport) -> None:
        """Keep what the ranks reported from the commit barrier."""
        self._commit = report

    def add_moved(self, requests: int) -> None:
        """Count requests that a retiring rank has migrated."""
        self._moved += requests

    def memory_before(self, status: MemoryStatus) -> None:
        """The ledger before anything is allocated."""
        self._memory = [
            DevicePeak(device=d.device, budget=d.budget, before=d.used, peak=d.used, after=d.used)
            for d in status.devices
        ]

    def memory_peak(self, peaks: Sequence[int]) -> None:
        """The most that was in use on each device; empty when nobody knows."""
        for index, peak in enumerate(peaks):
            known = self._memory[index]
            self._memory[index] = msgspec.structs.replace(known, peak=max(known.peak, peak))

    def memory_after(self, status: MemoryStatus) -> None:
        """The ledger when everything is given back and filled again. What grows then grows up to there."""
        for index, device in enumerate(status.devices):
            known = self._memory[index]
            peak = max(known.peak, device.used)
            self._memory[index] = msgspec.structs.replace(known, peak=peak, after=device.used)

    def view(self) -> Operation:
        plan, commit = self.plan, self._commit
        pause = dict(commit.pause_ms) if commit else {}
        return Operation(
            operation_id=self.operation_id,
            phase=self.phase,
            message="Nothing had to change." if plan.is_noop else _MESSAGES[self.phase],
            target=describe_target(self.target),
            old_ep_size=len(plan.before.ranks),
            new_ep_size=len(plan.after.ranks),
            ranks_before=list(plan.before.ranks),
            ranks_after=list(plan.after.ranks),
            joining=list(plan.joining),
            retiring=list(plan.retiring),
            moves=[Move(column=move.column, source=move.source, target=move.target) for move in plan.moves],
            epoch=plan.after.epoch,
            timings=self._timings(),
            created_at=self._created_at,
            columns_planned=len(plan.moves),
            columns_moved=sum(report.columns for report in self._pulled),
            bytes_moved=sum(report.bytes for report in self._pulled),
            moved_requests=self._moved,
            pause_ms=pause,
            max_pause_ms=max(pause.values(), default=None),
            memory=list(self._memory),
            error=self.error,
        )

    def _timings(self) -> Timings:
        spent = dict(self._spent)
        now = time.monotonic()
        if not self.phase.ended:
            spent[self.phase] = now - self._phase_started
        total = (self._phase_started if self.phase.ended else now) - self._started

        def milliseconds(phase: Phase) -> float | None:
            return round(spent[phase] * 1000, 3) if phase in spent else None

        return Timings(
            planned_ms=milliseconds(Phase.PLANNED),
            preparing_ms=milliseconds(Phase.PREPARING),
            committing_ms=milliseconds(Phase.COMMITTING),
            finishing_ms=milliseconds(Phase.FINISHING),
            total_ms=round(total * 1000, 3),
        )


def describe_target(target: Target) -> dict[str, int | list[int]]:
    """The target as a request says it."""
    match target:
        case ScaleTo(size=size):
            return {"new_ep_size": size}
        case RetireRanks(ranks=ranks):
            return {"retire_ranks": list(ranks)}
