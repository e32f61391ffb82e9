"""One change of membership, run through its phases as a transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.ports import MemoryPort, WorkersPort
from elasticmoe_sglang.coordinator.status import CommitReport, Phase, PullReport, RunningOperation
from elasticmoe_sglang.errors import ElasticMoEError, WorkerError
from elasticmoe_sglang.event_loop import run_together
from elasticmoe_sglang.planner import ColumnMove, Placement
from elasticmoe_sglang.undo import UndoLog
from elasticmoe_sglang.wire.to_worker import JoinSpec

logger = logging.getLogger(__name__)

# The commit barrier decides within the commit deadline; the workers' reports may arrive this much later.
_COMMIT_ANSWER_S = 1.0

# A description for error messages, and the call.
Step = tuple[str, Callable[[], Awaitable[object]]]


class Change:
    """Runs one operation: begin an HMM transaction, shrink KV, boot joining ranks and pull columns, commit, finish; or
    rolls back what was begun.

    A worker's undo is recorded before its step starts, because a step that failed half-way needs it too. The workers'
    undos run concurrently, then those of memory in order: the HMM must not free what a worker still maps.
    """

    def __init__(
        self,
        operation: RunningOperation,
        *,
        memory: MemoryPort,
        workers: WorkersPort,
        config: ElasticConfig,
        on_committed: Callable[[Membership, Placement], None],
    ) -> None:
        self._operation = operation
        self._plan = operation.plan
        self._memory = memory
        self._workers = workers
        self._config = config
        self._on_committed = on_committed
        self._txn: str | None = None
        self._worker_undo: UndoLog[Awaitable[object]] = UndoLog(operation.operation_id)
        self._memory_undo: UndoLog[Awaitable[object]] = UndoLog(operation.operation_id)
        self._preparing: asyncio.Future[None] | None = None
        self._interrupted: str | None = None

    async def run(self) -> None:
        """Run the operation to its end. Errors of the ports end the operation and are not raised."""
        operation = self._operation
        operation.advance(Phase.PREPARING)
        self._preparing = asyncio.ensure_future(self._prepare_in_time())
        try:
            await self._preparing
        except asyncio.CancelledError:
            await self._roll_back(self._interrupted or "the change was cancelled")
            return
        except Exception as error:
            logger.warning("operation %s: prepare failed", operation.operation_id, exc_info=True)
            await self._roll_back(_text(error))
            return
        operation.advance(Phase.COMMITTING)
        report = await self._commit()
        operation.set_commit(report)
        if not report.committed:
            await self._roll_back(report.reason or "the commit barrier did not commit")
            return
        self._on_committed(self._plan.after, self._plan.placement_after)
        operation.advance(Phase.FINISHING)
        problems = await self._finish()
        if problems:
            held = f"epoch {self._plan.after.epoch} serves, but cleaning up after the change failed"
            operation.end(Phase.FAILED, f"{held}: {'; '.join(problems)}")
        else:
            operation.end(Phase.DONE)

    def interrupt(self, why: str) -> None:
        """Cancel a change that is preparing, which rolls it back; does nothing in any other phase."""
        if self._preparing is not None and not self._preparing.done() and self._interrupted is None:
            self._interrupted = why
            self._preparing.cancel()

    async def _prepare_in_time(self) -> None:
        await run_together(self._config.prepare_deadline_s, "preparing", [self._prepare()])

    async def _prepare(self) -> None:
        self._operation.memory_before(await self._memory.status())
        self._txn = txn = await self._memory.begin(self._operation.operation_id)
        self._memory_undo.record("grow KV back", self._workers.grow_kv)
        self._memory_undo.record("roll back the HMM transaction", lambda: self._roll_back_memory(txn))
        kv_chunks = await self._workers.shrink_kv(self._plan)
        boots = [self._boot(rank, txn, kv_chunks.get(rank, 0)) for rank in self._plan.joining]
        pulls = [self._pull(rank, txn, moves) for rank in self._plan.survivors if (moves := self._plan.incoming(rank))]
        await run_together(None, "preparing", [*boots, *pulls])

    async def _boot(self, rank: int, txn: str, kv_chunks: int) -> None:
        plan = self._plan
        join_spec = JoinSpec(
            rank=rank,
            members=plan.after.ranks,
            epoch=plan.after.epoch,
            joining_rank=True,
            placement=plan.placement_after.owners,
            kv_chunks=kv_chunks,
            txn=txn,
            operation_id=self._operation.operation_id,
        )
        self._worker_undo.record(f"dismiss joining rank {rank}", lambda: self._workers.dismiss(rank))
        self._count(rank, plan.incoming(rank), await self._workers.boot(join_spec))

    async def _pull(self, rank: int, txn: str, moves: tuple[ColumnMove, ...]) -> None:
        self._worker_undo.record(
            f"drop the columns that rank {rank} pulled", lambda: self._workers.drop(rank, txn, moves)
        )
        self._count(rank, moves, await self._workers.pull(rank, txn, moves))

    def _count(self, rank: int, moves: Sequence[ColumnMove], report: PullReport) -> None:
        if report.columns != len(moves):
            raise WorkerError(
                f"only {report.columns} of {len(moves)} columns were pulled",
                rank=rank,
                operation=self._operation.operation_id,
            )
        self._operation.add_pull(report)

    async def _commit(self) -> CommitReport:
        """The workers' report or, when it does not arrive, what the control page says."""
        deadline = self._config.commit_deadline_s
        reports: list[CommitReport] = []

        async def commit() -> None:
            reports.append(await self._workers.commit(self._plan, deadline))

        try:
            await run_together(deadline + _COMMIT_ANSWER_S, "committing", [commit()])
        except Exception as error:
            logger.warning("operation %s: no report of the commit", self._operation.operation_id, exc_info=True)
            now = self._workers.membership()
            after = self._plan.after
            committed = (now.ranks, now.epoch) == (after.ranks, after.epoch)
            return CommitReport(committed=committed, reason=_text(error))
        return reports[0]

    async def _finish(self) -> list[str]:
        plan, txn = self._plan, self._txn
        assert txn is not None, "a commit without a transaction"
        problems = await self._each([("commit the HMM transaction", lambda: self._commit_memory(txn))])
        gone: set[int] = set()
        steps = [self._release(rank) for rank in plan.survivors if plan.outgoing(rank)]
        steps += [self._dismiss_retiring(rank, gone) for rank in plan.retiring]
        problems += await self._each(steps)
        # The worker of a retiring rank that did not exit may still map its columns: they stay in the ledger, and the
        # operation's error names the rank.
        problems += await self._each(
            [self._release(rank) for rank in plan.retiring if rank in gone and plan.outgoing(rank)]
        )
        problems += await self._each([("grow KV", self._workers.grow_kv)])
        return problems + await self._each([("read the ledger", self._read_ledger)])

    async def _commit_memory(self, txn: str) -> None:
        self._operation.memory_peak(await self._memory.commit(txn))

    async def _roll_back_memory(self, txn: str) -> None:
        self._operation.memory_peak(await self._memory.rollback(txn))

    async def _read_ledger(self) -> None:
        self._operation.memory_after(await self._memory.status())

    def _release(self, rank: int) -> Step:
        departed = [move.column for move in self._plan.outgoing(rank)]
        return f"release the columns that left rank {rank}", lambda: self._workers.release(rank, departed)

    def _dismiss_retiring(self, rank: int, gone: set[int]) -> Step:
        async def dismiss() -> None:
            self._operation.add_moved(await self._workers.dismiss(rank))
            gone.add(rank)

        return f"dismiss retiring rank {rank}", dismiss

    async def _roll_back(self, reason: str) -> None:
        problems = await self._each(self._worker_undo.take())
        for step in self._memory_undo.take():
            problems += await self._each([step])
        if problems:
            held = f"{reason}; epoch {self._plan.before.epoch} still serves, but the rollback was incomplete"
            self._operation.end(Phase.FAILED, f"{held}: {'; '.join(problems)}")
        else:
            self._operation.end(Phase.ROLLED_BACK, reason)

    async def _each(self, steps: Sequence[Step]) -> list[str]:
        """Run all steps concurrently, each within the finish deadline; a failure of one does not stop another.

        Returns:
            One sentence for each step that failed.
        """

        async def attempt(what: str, step: Callable[[], Awaitable[object]]) -> str | None:
            try:
                await run_together(self._config.finish_deadline_s, what, [_awaited(step)])
            except Exception as error:
                logger.error("operation %s: could not %s", self._operation.operation_id, what, exc_info=True)
                return f"could not {what}: {_text(error)}"
            return None

        results = await asyncio.gather(*(attempt(what, step) for what, step in steps))
        return [result for result in results if result is not None]


async def _awaited(step: Callable[[], Awaitable[object]]) -> None:
    await step()


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, ElasticMoEError) else f"{type(error).__name__}: {error}"
