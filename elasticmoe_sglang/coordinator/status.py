"""The coordinator's reports: operations, ranks and memory as plain values that are the JSON of the HTTP API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from elasticmoe_sglang.planner import ColumnMove, RetireRanks, ScalePlan, ScaleTo, Target


class Phase(str, Enum):
    """Phase of an operation. A change ends in done, failed (it needs attention) or rolled_back (nothing changed)."""

    PLANNED = "planned"
    PREPARING = "preparing"
    COMMITTING = "committing"
    FINISHING = "finishing"
    DONE = "done"
    FAILED = "failed"
    ROLLED_BACK = "rolled_back"

    @property
    def ended(self) -> bool:
        return self in (Phase.DONE, Phase.FAILED, Phase.ROLLED_BACK)


class RankState(str, Enum):
    """State of a rank as the coordinator reports it; `comm.control_page.WorkerState` is what a worker records itself.

    active: serves requests. joining, retiring: its worker takes part in the change that is running. standby: inactive,
    and a standby worker is ready for it. starting: the same, but that worker still imports what it needs. inactive:
    none of these.
    """

    ACTIVE = "active"
    STANDBY = "standby"
    STARTING = "starting"
    JOINING = "joining"
    RETIRING = "retiring"
    INACTIVE = "inactive"


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds spent in each phase, None if it was not reached. `total_ms` grows until the operation ends."""

    planned_ms: float | None = None
    preparing_ms: float | None = None
    committing_ms: float | None = None
    finishing_ms: float | None = None
    total_ms: float | None = None


class DevicePeak(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes in use on one device before a change, at most during it, and after it."""

    device: int
    budget: int
    before: int
    peak: int
    after: int


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One change of membership.

    Attributes:
        target: the fields of the request, {"new_ep_size": n} or {"retire_ranks": [...]}.
        moves: expert columns that move.
        epoch: the epoch after the change.
        columns_planned, columns_moved, bytes_moved: expert columns in the plan and pulled so far, and their bytes.
        moved_requests: requests migrated from retiring ranks to survivors.
        pause_ms: of each survivor, milliseconds from its last result before the commit to the first after it, less its
            median interval (`worker.pause.PauseMeter`); `max_pause_ms` is the largest.
        memory: each device; empty for a change that needed no memory.
        error: what failed, None if nothing did.
        created_at: Unix time in seconds.
    """

    operation_id: str
    phase: Phase
    message: str
    target: dict[str, int | list[int]]
    old_ep_size: int
    new_ep_size: int
    ranks_before: list[int]
    ranks_after: list[int]
    joining: list[int]
    retiring: list[int]
    moves: list[ColumnMove]
    epoch: int
    timings: Timings
    created_at: float
    columns_planned: int
    columns_moved: int = 0
    bytes_moved: int = 0
    moved_requests: int = 0
    pause_ms: dict[int, float] = {}
    max_pause_ms: float | None = None
    memory: list[DevicePeak] = []
    error: str | None = None


class RankInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One rank and its worker.

    Attributes:
        pid: of its worker, or of the standby worker that is ready for it; None: neither exists.
        checkpoint_bytes: read from the checkpoint by its worker; None until the worker has reported it.
        load_s: seconds in which its worker filled or attached its weights; None until the worker has reported it.
        first_uses: kernels that its worker has loaded since it serves; their names are in its log. None as above.
        kv_bytes: HMM memory of its KV cache, None where SGLang allocated it.
        kv_tokens, kv_used, kv_cached: capacity, tokens of running requests, tokens of cached prefixes; None for a rank
            that is not active.
    """

    rank: int
    state: RankState
    device: int
    pid: int | None = None
    checkpoint_bytes: int | None = None
    load_s: float | None = None
    first_uses: int | None = None
    kv_bytes: int | None = None
    kv_tokens: int | None = None
    kv_used: int | None = None
    kv_cached: int | None = None


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One device in the HMM's ledger, in bytes; `by_kind` splits `used` into dense, column, window, kv and other."""

    device: int
    budget: int
    used: int
    peak: int
    by_kind: dict[str, int]


class MemoryStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The HMM's current answer; without one `available` is False and `error` says why."""

    available: bool
    endpoint: str | None = None
    pid: int | None = None
    devices: list[DeviceMemory] = []
    column_bytes: int | None = None
    dense_bytes: int | None = None
    error: str | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Snapshot of the whole server. `placement[c]` is the rank that holds expert column c."""

    ep_size: int
    max_ep_size: int
    epoch: int
    membership: list[int]
    ranks: list[RankInfo]
    placement: list[int]
    memory: MemoryStatus
    running: Operation | None
    last: Operation | None


@dataclass(frozen=True, kw_only=True)
class PullReport:
    """What one worker has pulled."""

    columns: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class CommitReport:
    """The outcome of the commit barrier.

    Attributes:
        pause_ms: milliseconds by which the commit delayed each rank.
        reason: why it was not committed.
    """

    committed: bool
    pause_ms: Mapping[int, float] = field(default_factory=dict)
    reason: str | None = None


_NEXT: dict[Phase, tuple[Phase, ...]] = {
    Phase.PLANNED: (Phase.PREPARING, Phase.DONE, Phase.ROLLED_BACK),
    Phase.PREPARING: (Phase.COMMITTING, Phase.ROLLED_BACK, Phase.FAILED),
    Phase.COMMITTING: (Phase.FINISHING, Phase.ROLLED_BACK, Phase.FAILED),
    Phase.FINISHING: (Phase.DONE, Phase.FAILED),
}

_MESSAGES: dict[Phase, str] = {
    Phase.PLANNED: "The change is planned.",
    Phase.PREPARING: "Joining ranks boot and columns are pulled; serving goes on.",
    Phase.COMMITTING: "All ranks meet at the commit barrier between two batches.",
    Phase.FINISHING: "The new membership serves; columns that moved away are released.",
    Phase.DONE: "The change is done.",
    Phase.FAILED: "The change failed and needs attention; `error` says which epoch serves.",
    Phase.ROLLED_BACK: "The change was rolled back; the server is as before it.",
}


class RunningOperation:
    """Mutable record of one change; `view()` returns it as an `Operation`."""

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
        """Enter the next phase and stop the clock of the previous one."""
        assert phase in _NEXT.get(self.phase, ()), f"{self.phase} -> {phase}"
        now = time.monotonic()
        self._spent[self.phase] = now - self._phase_started
        self.phase, self._phase_started = phase, now
        if phase.ended:
            self.ended.set()

    def end(self, phase: Phase, error: str | None = None) -> None:
        """Enter the last phase; `error` says why unless it is DONE."""
        self.error = error
        self.advance(phase)

    def add_pull(self, report: PullReport) -> None:
        """Count columns that were pulled."""
        self._pulled.append(report)

    def set_commit(self, report: CommitReport) -> None:
        """Keep the outcome of the commit barrier."""
        self._commit = report

    def add_moved(self, requests: int) -> None:
        """Count requests that a retiring rank has migrated."""
        self._moved += requests

    def memory_before(self, status: MemoryStatus) -> None:
        """Record the ledger before anything is allocated."""
        self._memory = [
            DevicePeak(device=d.device, budget=d.budget, before=d.used, peak=d.used, after=d.used)
            for d in status.devices
        ]

    def memory_peak(self, peaks: Sequence[int]) -> None:
        """Record the most bytes in use on each device; empty when unknown."""
        for index, peak in enumerate(peaks):
            known = self._memory[index]
            self._memory[index] = msgspec.structs.replace(known, peak=max(known.peak, peak))

    def memory_after(self, status: MemoryStatus) -> None:
        """Record the ledger after memory was released and KV has grown into it, which can be the peak."""
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
            moves=list(plan.moves),
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
    """The target as the fields of a request."""
    match target:
        case ScaleTo(size=size):
            return {"new_ep_size": size}
        case RetireRanks(ranks=ranks):
            return {"retire_ranks": list(ranks)}
