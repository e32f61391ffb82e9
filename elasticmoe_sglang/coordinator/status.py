"""The coordinator's reports: operations, ranks and memory as plain values that are the JSON of the HTTP API."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import msgspec

from elasticmoe_sglang.planner import (
    Cause,
    ColumnMove,
    Rebalance,
    RestoreRanks,
    RetireRanks,
    ScaleTo,
    Target,
    TransitionPlan,
)


class Phase(str, Enum):
    """Phase of an operation. It ends in one of: done. rolled_back: serving is as before the change. failed: something
    needs attention, before or after the commit; the operation's `serving_epoch` tells which membership serves."""

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

    active: serves requests. joining, retiring: its worker takes part in the change that is running. hot: inactive, and
    a worker has booted for it. standby: inactive, and a standby worker is ready for it. starting: inactive, and one of
    the two still imports what it needs, or boots. inactive: none of these.
    """

    ACTIVE = "active"
    HOT = "hot"
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
    """One change of the view.

    Attributes:
        cause: target (it was asked for), loss (workers died; survivors went on), restore (lost ranks came back).
        target: the fields of the request, {"new_ep_size": n}, {"retire_ranks": [...]} or {"restore_ranks": [...]};
            empty for the other causes.
        lost: ranks whose workers had died.
        moves: expert columns that a rank gets, as their owner or as a copy. copies: of columns, after the change.
        epoch: the one that the change commits, with `ranks_after`. It is not reached where the change is rolled back,
            and another change may reach it then.
        serving_epoch: the one that served when the operation ended; None while it runs. `ranks_after` serve in it if it
            is `epoch`, and `ranks_before` otherwise, unless a rank was lost meanwhile.
        columns_planned, columns_moved, bytes_moved: expert columns in the plan and pulled so far, and their bytes.
        moved_requests: requests migrated from retiring ranks to survivors.
        recomputed_requests: of them, those whose KV found no room on the survivors and is computed again.
        spread_requests: that waited on a rank and have not begun; they went to joining ranks.
        resent_requests: requests of a rank that died, sent again to others.
        attempts: how often it was begun; a loss is tried again until it is committed.
        pause_ms: of each survivor, milliseconds from its last result before the commit to the first after it, less its
            median interval (`worker.pause.PauseMeter`); `max_pause_ms` is the largest.
        memory: each device; empty for a change that needed no memory.
        error: what failed, None if nothing did.
        created_at: Unix time in seconds.
    """

    operation_id: str
    cause: Cause
    phase: Phase
    message: str
    target: dict[str, int | list[int]]
    old_ep_size: int
    new_ep_size: int
    ranks_before: list[int]
    ranks_after: list[int]
    joining: list[int]
    retiring: list[int]
    lost: list[int] = []
    moves: list[ColumnMove]
    copies: int = 0
    epoch: int
    serving_epoch: int | None = None
    timings: Timings
    created_at: float
    columns_planned: int
    columns_moved: int = 0
    bytes_moved: int = 0
    moved_requests: int = 0
    recomputed_requests: int = 0
    spread_requests: int = 0
    resent_requests: int = 0
    attempts: int = 1
    pause_ms: dict[int, float] = {}
    max_pause_ms: float | None = None
    memory: list[DevicePeak] = []
    error: str | None = None

    @property
    def rebalances(self) -> bool:
        """Whether it was asked for to place columns by load, on the same ranks."""
        return "rebalance" in self.target


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
        cores: those that its worker is bound to; None: any.
    """

    rank: int
    state: RankState
    device: int
    cores: tuple[int, ...] | None = None
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
    """Snapshot of the whole server.

    Attributes:
        membership: the active ranks. target_ranks: those of the last target; ranks that were lost since come back.
        placement: placement[c] is the rank that owns expert column c.
        copies: expert column -> the other ranks that hold it, ascending, of columns with copies.
        redundant_experts: the most copies there may be.
        routed: rank -> tokens that it computed while routing was observed last, over all layers; empty before.
        attention_tp: ranks of an attention replica, of which sizes are multiples: replica r is ranks
            r * attention_tp to (r + 1) * attention_tp - 1.
    """

    ep_size: int
    max_ep_size: int
    epoch: int
    membership: list[int]
    target_ranks: list[int]
    ranks: list[RankInfo]
    placement: list[int]
    copies: dict[int, list[int]] = {}
    redundant_experts: int = 0
    routed: dict[int, int] = {}
    memory: MemoryStatus
    running: Operation | None
    last: Operation | None
    attention_tp: int = 1


@dataclass(frozen=True, kw_only=True)
class PullReport:
    """What one worker has pulled."""

    columns: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What one retiring rank has migrated.

    Attributes:
        requests: all of them. recomputed: those that had KV which could not be kept.
    """

    requests: int
    recomputed: int = 0


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


@dataclass(frozen=True, kw_only=True)
class Withdrawal:
    """The end of a proposal that was given up.

    Attributes:
        committed: it was too late to give it up.
        absent: participants that have not reported a decision; their workers live.
    """

    committed: bool
    absent: tuple[int, ...] = ()


_NEXT: dict[Phase, tuple[Phase, ...]] = {
    Phase.PLANNED: (Phase.PREPARING, Phase.DONE, Phase.ROLLED_BACK, Phase.FAILED),
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
    Phase.FAILED: "The change failed and needs attention; `serving_epoch` is the epoch that serves.",
    Phase.ROLLED_BACK: "The change was rolled back; the server is as before it.",
}


class RunningOperation:
    """Mutable record of one change; `view()` returns it as an `Operation`."""

    def __init__(self, operation_id: str, target: Target | None, plan: TransitionPlan, started: float) -> None:
        self.operation_id = operation_id
        self.target = target
        self.ended = asyncio.Event()
        self._created_at = time.time()
        self._started = started
        self._attempts = 0
        self.begin(plan, started)

    def begin(self, plan: TransitionPlan, now: float | None = None) -> None:
        """Begin, or begin again with another plan."""
        self.plan = plan
        self.phase = Phase.PLANNED
        self.error: str | None = None
        self._serving_epoch: int | None = None
        self.ended.clear()
        self._attempts += 1
        self._phase_started = time.monotonic() if now is None else now
        self._spent: dict[Phase, float] = {}
        self._pulled: list[PullReport] = []
        self._pauses: dict[int, float] = {}
        self._moved = self._recomputed = self._spread = self._resent = 0
        self._memory: list[DevicePeak] = []

    def advance(self, phase: Phase, error: str | None = None, *, serving_epoch: int) -> None:
        """Enter the next phase and stop the clock of the previous one.

        Args:
            error: why it failed or was undone. serving_epoch: the one that serves now.
        """
        assert phase in _NEXT.get(self.phase, ()), f"{self.phase} -> {phase}"
        now = time.monotonic()
        self._spent[self.phase] = now - self._phase_started
        self.phase, self._phase_started, self.error = phase, now, error
        if phase.ended:
            self._serving_epoch = serving_epoch
            self.ended.set()

    def add_pull(self, report: PullReport) -> None:
        """Count columns that were pulled."""
        self._pulled.append(report)

    def add_pauses(self, pauses: Mapping[int, float]) -> None:
        """Keep the ranks' pauses in milliseconds; a later, measured one replaces the time at the commit barrier."""
        self._pauses |= pauses

    def add_moved(self, moved: Moved) -> None:
        """Count requests that a retiring rank has migrated."""
        self._moved += moved.requests
        self._recomputed += moved.recomputed

    def add_spread(self, requests: int) -> None:
        """Waiting requests went to joining ranks."""
        self._spread += requests

    def add_resent(self, requests: int) -> None:
        """Count requests that were sent again because their rank had died."""
        self._resent += requests

    def memory_before(self, status: MemoryStatus) -> None:
        """Record the ledger before anything is allocated."""
        self._memory = [
            DevicePeak(device=d.device, budget=d.budget, before=d.used, peak=d.used, after=d.used)
            for d in status.devices
        ]

    def memory_peak(self, peaks: Sequence[int]) -> None:
        """Record the most bytes in use on each device; empty when unknown."""
        for index, (known, peak) in enumerate(zip(self._memory, peaks, strict=False)):
            self._memory[index] = msgspec.structs.replace(known, peak=max(known.peak, peak))

    def memory_after(self, status: MemoryStatus) -> None:
        """Record the ledger after memory was released and KV has grown into it, which can be the peak."""
        for index, (known, device) in enumerate(zip(self._memory, status.devices, strict=False)):
            peak = max(known.peak, device.used)
            self._memory[index] = msgspec.structs.replace(known, peak=peak, after=device.used)

    def view(self) -> Operation:
        plan, pause = self.plan, dict(self._pauses)
        return Operation(
            operation_id=self.operation_id,
            cause=plan.cause,
            phase=self.phase,
            message="Nothing had to change." if plan.is_noop else _MESSAGES[self.phase],
            target=describe_target(self.target) if self.target is not None else {},
            old_ep_size=len(plan.before.ranks),
            new_ep_size=len(plan.after.ranks),
            ranks_before=list(plan.before.ranks),
            ranks_after=list(plan.after.ranks),
            joining=list(plan.joining),
            retiring=list(plan.retiring),
            lost=list(plan.lost),
            moves=list(plan.moves),
            copies=len(plan.after.placement.copies),
            epoch=plan.after.epoch,
            serving_epoch=self._serving_epoch,
            timings=self._timings(),
            created_at=self._created_at,
            columns_planned=len(plan.moves),
            columns_moved=sum(report.columns for report in self._pulled),
            bytes_moved=sum(report.bytes for report in self._pulled),
            moved_requests=self._moved,
            recomputed_requests=self._recomputed,
            spread_requests=self._spread,
            resent_requests=self._resent,
            attempts=self._attempts,
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
    """The target as the fields of a request; of a rebalance the number of routed tokens that it goes by."""
    match target:
        case ScaleTo(size=size):
            return {"new_ep_size": size}
        case RetireRanks(ranks=ranks):
            return {"retire_ranks": list(ranks)}
        case RestoreRanks(ranks=ranks):
            return {"restore_ranks": list(ranks)}
        case Rebalance(load=load):
            return {"rebalance": int(sum(load))}
