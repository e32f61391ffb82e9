"""What the coordinator tells about itself: frozen, plain values, ready for JSON. Imports nothing but msgspec.

The HTTP payloads are these structs as they are; `api.types` names them again for clients.
"""

from __future__ import annotations

from enum import Enum

import msgspec

from elasticmoe_sglang.planner import ColumnMove


class Phase(str, Enum):
    """Where an operation stands. planned, preparing, committing, finishing, done; or one of two bad ends."""

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
    """What is in a rank."""

    ACTIVE = "active"
    STANDBY = "standby"
    JOINING = "joining"
    RETIRING = "retiring"
    INACTIVE = "inactive"


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds spent in each phase; None: not reached. `total_ms` runs until the operation ends."""

    planned_ms: float | None = None
    preparing_ms: float | None = None
    committing_ms: float | None = None
    finishing_ms: float | None = None
    total_ms: float | None = None


class DevicePeak(msgspec.Struct, frozen=True, kw_only=True):
    """One device's memory around a change, in bytes: in use before it, at most during it, and after it."""

    device: int
    budget: int
    before: int
    peak: int
    after: int


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One change of membership, from the target to its end.

    Attributes:
        target: the words of the request, {"new_ep_size": n} or {"retire_ranks": [...]}.
        epoch: the epoch that the change leads to.
        columns_planned, columns_moved, bytes_moved: expert columns, and the bytes that the receivers pulled so far.
        moved_requests: requests handed from retiring ranks to others.
        pause_ms: of each rank that stayed, milliseconds from its last result before the commit to the first after it,
            less its median interval (`ranks.pause.PauseMeter`); `max_pause_ms` is the largest.
        memory: each device before, at the peak and after; empty for a change that needed none.
        error: what went wrong, None while nothing did.
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
    """One rank. `pid` is None when no process sits in it.

    checkpoint_bytes: what its process read of the checkpoint; load_s: seconds in which it filled or attached its
        weights. None until it has said so.
    kv_bytes: HMM memory of its KV cache, None where that is SGLang's own.
    kv_tokens: what it has room for; kv_used: tokens of its requests; kv_cached: tokens kept for next requests. None
        for a rank that does not serve.
    """

    rank: int
    state: RankState
    device: int
    pid: int | None = None
    checkpoint_bytes: int | None = None
    load_s: float | None = None
    kv_bytes: int | None = None
    kv_tokens: int | None = None
    kv_used: int | None = None
    kv_cached: int | None = None


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One device in the HMM's ledger, in bytes; `by_kind` splits `used` (dense, column, window, kv, other)."""

    device: int
    budget: int
    used: int
    peak: int
    by_kind: dict[str, int]


class MemoryStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The HMM as it answers now; `available` False: it does not, and `error` says why."""

    available: bool
    endpoint: str | None = None
    pid: int | None = None
    devices: list[DeviceMemory] = []
    column_bytes: int | None = None
    dense_bytes: int | None = None
    error: str | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The whole server at one moment. `placement[c]` is the rank that holds expert column c."""

    ep_size: int
    max_ep_size: int
    epoch: int
    membership: list[int]
    ranks: list[RankInfo]
    placement: list[int]
    memory: MemoryStatus
    running: Operation | None
    last: Operation | None
