"""What the coordinator needs from the rest of the system, as two protocols.

A call may be cancelled when its deadline is over, and it may raise anything; the coordinator then undoes the step as
written at each call. It never retries: retries are the implementation's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.coordinator.status import MemoryStatus, RankInfo
from elasticmoe_sglang.planner import ColumnMove, ScalePlan
from elasticmoe_sglang.wire.to_worker import JoinSpec


@dataclass(frozen=True, kw_only=True)
class PullReport:
    """What one rank has pulled."""

    columns: int
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CommitReport:
    """How the ranks left the commit barrier.

    Attributes:
        epoch: the epoch that holds now, the old one when not committed.
        pause_ms: milliseconds that each rank stood still.
        reason: why it was not committed.
    """

    committed: bool
    epoch: int
    pause_ms: Mapping[int, float] = field(default_factory=dict)
    reason: str | None = None


class MemoryPort(Protocol):
    """The HMM."""

    async def status(self) -> MemoryStatus:
        """The ledger now. Raises HmmUnavailable when nobody answers."""

    async def begin(self, operation_id: str) -> str:
        """Open a transaction. If the call fails, nothing stays open: the HMM drops transactions without an owner."""

    async def commit(self, txn: str) -> Sequence[int]:
        """Keep what was allocated in the transaction. Called once, after the ranks have committed.

        Returns:
            For each device the most bytes that were in use on it while the transaction was open.
        """

    async def rollback(self, txn: str) -> Sequence[int]:
        """Free all that was allocated in the transaction. Called once for each begin that returned and was undone.

        Returns:
            As `commit`; empty when that went with its HMM.
        """


class WorkersPort(Protocol):
    """The processes in the ranks, by way of the IMM and the ranks' agents."""

    def ranks(self) -> Sequence[RankInfo]:
        """All ranks, ascending, from what is known here: does not wait for anybody."""

    def membership(self) -> Membership:
        """The membership committed last, read from the commit barrier's control page: the truth when a commit gave no
        answer."""

    def least_kv_bytes(self) -> int:
        """What a rank's KV cache cannot do without."""

    async def shrink_kv(self, plan: ScalePlan) -> Mapping[int, int]:
        """Before anything is allocated: survivors give up KV for the columns they are to receive, while they serve.

        Undone by `fill_kv`, after the HMM's rollback.

        Returns:
            Chunks for each joining rank to begin with.
        """

    async def grow_kv(self) -> None:
        """Let KV have all that is free: when departed columns are given back, or a change is rolled back."""

    async def boot(self, join_spec: JoinSpec) -> PullReport:
        """A standby takes its rank, boots, attaches, pulls its columns and waits at the commit barrier. Raises
        WorkerError.

        Undone by `dismiss`, which is called once for each boot that was started, however it ended.
        """

    async def pull(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> PullReport:
        """A survivor pulls columns into free slots while it goes on serving; no table points at them yet.

        Undone by `drop`, which is called once for each pull that was started, however it ended.
        """

    async def drop(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> None:
        """The survivor stops pulling and unmaps what it had of these columns. The HMM frees them by its rollback."""

    async def commit(self, plan: ScalePlan, deadline_s: float) -> CommitReport:
        """All ranks switch to `plan.after` between the same two batches, or none does.

        When this has returned, has raised, or `deadline_s` is over, the change cannot happen any more unless it has
        happened already: a command that reaches the leader later is refused by it.
        """

    async def release(self, rank: int, columns: Sequence[int]) -> None:
        """Give columns that departed from `rank` back to the HMM: unmap them if the rank is active, then free them.

        For a retiring rank it is called after `dismiss`, so nobody maps them any more.
        """

    async def dismiss(self, rank: int) -> int:
        """Make the rank a standby again: end a joining rank in whatever state its boot is, or wait for a retiring
        rank's exit.

        Returns:
            Requests that a retiring rank handed to others.
        """
