"""What the coordinator needs from the rest of the system, as three protocols.

The driver makes a call of `MemoryPort` or `WorkersPort` for each step of the engine (`steps.py`). A call may be
cancelled at its deadline and may raise anything; the engine then undoes the step as written at each method. It never
retries: implementations do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from elasticmoe_sglang.coordinator.status import CommitReport, MemoryStatus, Moved, PullReport, RankInfo, Withdrawal
from elasticmoe_sglang.planner import ColumnMove, TransitionPlan, View
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

    async def send_again(
        self, rids: set[str], *, gone: Collection[tuple[int, int]], suspect: bool, ranks: Sequence[int] = ()
    ) -> int:
        """Send those of these requests that are still open to active ranks; returns how many.

        Args:
            ranks: those of them that are active, in turn; empty, or none is: to all active ones.
            gone: (rank, incarnation) of workers that have ended; their outputs do not count any more.
            suspect: one of them may be what ended their rank.
        """


class MemoryPort(Protocol):
    """The HMM."""

    async def status(self) -> MemoryStatus:
        """The current ledger. Raises HmmUnavailable when no HMM answers."""

    async def begin(self, operation_id: str) -> str:
        """Open a transaction. A failed call leaves none open: the HMM rolls back transactions without an owner."""

    async def commit(self, txn: str) -> Sequence[int]:
        """Keep what was allocated in the transaction. Called after the workers have committed; again if it raised.

        Returns:
            For each device the most bytes that were in use on it while the transaction was open.
        """

    async def rollback(self, txn: str) -> Sequence[int]:
        """Free everything allocated in the transaction. Called for each `begin` that is undone; again if it raised.

        Returns:
            As `commit`; empty when the HMM of the transaction has ended.
        """


class WorkersPort(Protocol):
    """The workers, reached through the IMM and their agents."""

    def ranks(self) -> Sequence[RankInfo]:
        """All ranks, ascending, from what this process knows: sends no message."""

    def view(self) -> View:
        """The view committed last, read from the control page: correct even if no report of a commit arrived."""

    async def kill(self, rank: int, pid: int, *, stalled: bool) -> None:
        """End the rank's worker, if it is still this process. stalled: perhaps by a request's doing."""

    async def count_routed(self, ranks: Sequence[int]) -> Mapping[int, Sequence[int]]:
        """Rank -> tokens routed to each expert column and computed there since its worker has booted, over all layers.

        Raises:
            WorkerError: a rank does not count them, or died.
        """

    def least_kv_bytes(self) -> int:
        """The least KV memory a rank needs, in bytes."""

    async def drop_kv(self, ranks: Sequence[int]) -> None:
        """Release the KV memory of ranks whose workers have ended."""

    async def shrink_kv(self, plan: TransitionPlan) -> Mapping[int, int]:
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

    async def commit_ranks(self, plan: TransitionPlan, attempt: int, expires: float) -> CommitReport:
        """Switch all participants to `plan.after` between the same two batches, or none.

        When it raises or is cancelled, the outcome is unknown until `withdraw` has returned.

        Args:
            expires: CLOCK_MONOTONIC seconds after which the leader of the commit barrier refuses.
        """

    async def withdraw(self, plan: TransitionPlan, attempt: int) -> Withdrawal:
        """Decide ABORT for this proposal if it has no decision yet.

        Raises:
            CommitError: no decision could be made or read; call again.
        """

    async def pauses(self, ranks: Sequence[int]) -> Mapping[int, float]:
        """The pauses that these ranks have measured since the commit, in milliseconds, as far as they come at once."""

    async def route(self, ranks: Sequence[int]) -> None:
        """Route new requests to these ranks only."""

    async def migrate(self, rank: int, operation_id: str) -> Moved:
        """Have survivors resume the requests of a retiring rank.

        Raises:
            WorkerError: the retiring rank died, or requests are missing: `resend` what is on no rank.
        """

    async def spread_waiting(self, ranks: Sequence[int], joining: Sequence[int]) -> int:
        """Have these ranks give requests that wait there to joining ones, which new requests are routed to already.

        Returns:
            Number of requests. Those of a rank that died meanwhile are not among them.

        Raises:
            WorkerError: requests may be on no rank: `resend` them.
        """

    async def resend(self, operation_id: str, forget: Sequence[int]) -> int:
        """Send open requests that are on no rank again. Returns their number.

        Args:
            operation_id: a recovery's commit, after which its participants report their requests unasked; "": ask them.
            forget: ranks that ended while they retired, whose requests have arrived in part.
        """

    async def release(self, rank: int, columns: Sequence[int]) -> None:
        """Release columns that moved away from `rank`: its worker unmaps them if it is active, then the HMM frees them.

        For a rank that is not active any more it is called once its worker has exited.
        """

    async def dismiss(self, rank: int) -> None:
        """End a joining rank's worker, whatever the state of its boot, or wait until a retiring rank's worker exits."""
