"""What the coordinator needs from the rest of the system, as three protocols.

A call of `MemoryPort` or `WorkersPort` may be cancelled at its deadline and may raise anything; the coordinator then
undoes the step as written at each method. It never retries: implementations do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.coordinator.status import CommitReport, MemoryStatus, PullReport, RankInfo
from elasticmoe_sglang.planner import ColumnMove, ScalePlan
from elasticmoe_sglang.wire.to_worker import CommitCommand, JoinSpec


class SglangPort(Protocol):
    """SGLang's message path from the tokenizer to the schedulers, and the end of a worker."""

    async def send_command(self, command: CommitCommand) -> None:
        """Broadcast a commit to all ranks, after control requests in progress have been answered."""

    async def send_route(self, ranks: Sequence[int]) -> None:
        """Route new requests to these ranks only."""

    async def send_recover_route(self, operation_id: str, ranks: Sequence[int]) -> set[str]:
        """Like `send_route`, after a worker's death: also puts a fence into each rank's queue.

        Returns:
            Ids of the requests that were open when the message was sent.
        """

    async def send_again(self, rids: set[str]) -> int:
        """Send those of these requests that are still open to active ranks; returns how many."""

    def rank_lost(self, rank: int, reason: str) -> None:
        """The worker of an active rank exited unexpectedly; `reason` is a sentence."""


class MemoryPort(Protocol):
    """The HMM."""

    async def status(self) -> MemoryStatus:
        """The current ledger. Raises HmmUnavailable when no HMM answers."""

    async def begin(self, operation_id: str) -> str:
        """Open a transaction. A failed call leaves none open: the HMM rolls back transactions without an owner."""

    async def commit(self, txn: str) -> Sequence[int]:
        """Keep what was allocated in the transaction. Called once, after the workers have committed.

        Returns:
            For each device the most bytes that were in use on it while the transaction was open.
        """

    async def rollback(self, txn: str) -> Sequence[int]:
        """Free everything allocated in the transaction. Called once for each `begin` that returned and is undone.

        Returns:
            As `commit`; empty when the HMM of the transaction has ended.
        """


class WorkersPort(Protocol):
    """The workers, reached through the IMM and their agents."""

    def ranks(self) -> Sequence[RankInfo]:
        """All ranks, ascending, from what this process knows: sends no message."""

    def membership(self) -> Membership:
        """The membership committed last, read from the control page: correct even if no report of a commit arrived."""

    def least_kv_bytes(self) -> int:
        """The least KV memory a rank needs, in bytes."""

    async def shrink_kv(self, plan: ScalePlan) -> Mapping[int, int]:
        """Before anything is allocated: shrink survivors' KV by what the columns need that they will receive.

        Undone by `grow_kv`, after the HMM's rollback.

        Returns:
            Chunks of KV for each joining rank to start with.
        """

    async def grow_kv(self) -> None:
        """Grow KV into all free memory, once a change has released columns or was rolled back."""

    async def boot(self, join_spec: JoinSpec) -> PullReport:
        """Have a standby worker boot as its rank: attach weights, pull columns, wait at the commit barrier.

        Undone by `dismiss`, called once for each boot that was started, however it ended. Raises WorkerError.
        """

    async def pull(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> PullReport:
        """Have a survivor pull columns into free slots while it serves; no slot table points at them yet.

        Undone by `drop`, called once for each pull that was started, however it ended.
        """

    async def drop(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> None:
        """Have a survivor stop pulling and unmap what it pulled of these columns; the HMM's rollback frees them."""

    async def commit(self, plan: ScalePlan, deadline_s: float) -> CommitReport:
        """Switch all ranks to `plan.after` between the same two batches, or none.

        Once this has returned or raised, or `deadline_s` has passed, the commit either has happened or never will: the
        leader refuses a command that arrives later.
        """

    async def release(self, rank: int, columns: Sequence[int]) -> None:
        """Release columns that moved away from `rank`: its worker unmaps them if it is active, then the HMM frees them.

        For a retiring rank it is called after `dismiss`, when its worker has exited.
        """

    async def dismiss(self, rank: int) -> int:
        """End a joining rank's worker, whatever the state of its boot, or wait until a retiring rank's worker exits.

        Returns:
            Number of requests that a retiring rank migrated.
        """
