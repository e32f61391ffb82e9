"""One change, driven through its phases as a transaction."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.operation import RunningOperation
from elasticmoe_sglang.coordinator.ports import CommitReport, MemoryPort, PullReport, WorkersPort
from elasticmoe_sglang.coordinator.status import Phase
from elasticmoe_sglang.errors import ElasticMoEError, PhaseTimeout, WorkerError
from elasticmoe_sglang.planner import ColumnMove, ScalePlan
from elasticmoe_sglang.wire.to_worker import JoinSpec

logger = logging.getLogger(__name__)

# The commit barrier decides within the commit deadline; this is for its answer to arrive.
_COMMIT_ANSWER_S = 1.0

# What it is, for the error text, and how to do it.
Step = tuple[str, Callable[[], Awaitable[None]]]


class Change:
    """Runs one operation: begin, make room, boot and pull, commit, keep, dismiss, release, fill; or the undo of what
    was begun.

    An undo is noted before a rank starts its step, because a step that failed half-way needs it too, and it runs
    exactly once. Undos of ranks run together, then the HMM's rollback: nothing is freed while a rank maps it.
    """

    def __init__(
        self,
        operation: RunningOperation,
        *,
        memory: MemoryPort,
        ranks: WorkersPort,
        config: ElasticConfig,
        on_committed: Callable[[ScalePlan], None],
    ) -> None:
        self._operation = operation
        self._plan = operation.plan
        self._memory = memory
        self._workers = ranks
        self._config = config
        self._on_committed = on_committed
        self._txn: str | None = None
        self._undos: list[Step] = []
        self._preparing: asyncio.Future[None] | None = None
        self._interrupted: str | None = None

    async def run(self) -> None:
        """To the operation's end. Never raises for what the ports do."""
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
            await self._roll_back(report.reason or "the ranks did not pass the commit barrier")
            return
        self._on_committed(self._plan)
        operation.advance(Phase.FINISHING)
        problems = await self._finish()
        if problems:
            held = f"epoch {self._plan.after.epoch} serves, but was not tidied up"
            operation.end(Phase.FAILED, f"{held}: {'; '.join(problems)}")
        else:
            operation.end(Phase.DONE)

    def interrupt(self, why: str) -> None:
        """Stop preparing and roll back; nothing where that is over, or being undone already."""
        if self._preparing is not None and not self._preparing.done() and self._interrupted is None:
            self._interrupted = why
            self._preparing.cancel()

    async def _prepare_in_time(self) -> None:
        await _within(self._config.prepare_deadline_s, "preparing", [self._prepare()])

    async def _prepare(self) -> None:
        self._operation.memory_before(await self._memory.status())
        self._txn = txn = await self._memory.begin(self._operation.operation_id)
        first = await self._workers.shrink_kv(self._plan)
        boots = [self._boot(rank, txn, first.get(rank, 0)) for rank in self._plan.joining]
        pulls = [self._pull(rank, txn, moves) for rank in self._plan.survivors if (moves := self._plan.incoming(rank))]
        await _within(None, "preparing", [*boots, *pulls])

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
        self._undos.append((f"dismiss joining rank {rank}", lambda: self._dismiss_joining(rank)))
        self._count(rank, plan.incoming(rank), await self._workers.boot(join_spec))

    async def _dismiss_joining(self, rank: int) -> None:
        await self._workers.dismiss(rank)

    async def _pull(self, rank: int, txn: str, moves: tuple[ColumnMove, ...]) -> None:
        self._undos.append((f"drop what rank {rank} pulled", lambda: self._workers.drop(rank, txn, moves)))
        self._count(rank, moves, await self._workers.pull(rank, txn, moves))

    def _count(self, rank: int, moves: Sequence[ColumnMove], report: PullReport) -> None:
        if report.columns != len(moves):
            raise WorkerError(
                f"only {report.columns} of {len(moves)} columns arrived",
                rank=rank,
                operation=self._operation.operation_id,
            )
        self._operation.add_pull(report)

    async def _commit(self) -> CommitReport:
        """The ranks' report, or, when there is none, what their control page says."""
        deadline = self._config.commit_deadline_s
        reports: list[CommitReport] = []

        async def commit() -> None:
            reports.append(await self._workers.commit(self._plan, deadline))

        try:
            await _within(deadline + _COMMIT_ANSWER_S, "committing", [commit()])
        except Exception as error:
            logger.warning("operation %s: commit gave no report", self._operation.operation_id, exc_info=True)
            now = self._workers.membership()
            after = self._plan.after
            committed = (now.ranks, now.epoch) == (after.ranks, after.epoch)
            return CommitReport(committed=committed, epoch=now.epoch, reason=_text(error))
        return reports[0]

    async def _finish(self) -> list[str]:
        plan, txn = self._plan, self._txn
        assert txn is not None, "a commit without a transaction"
        problems = await self._each([("keep the HMM transaction", lambda: self._keep(txn))])
        gone: set[int] = set()
        steps = [self._release(rank) for rank in plan.survivors if plan.outgoing(rank)]
        steps += [self._dismiss_retiring(rank, gone) for rank in plan.retiring]
        problems += await self._each(steps)
        # A retiring rank that may still be there may still map its columns: they stay in the ledger, and the error
        # tells.
        problems += await self._each(
            [self._release(rank) for rank in plan.retiring if rank in gone and plan.outgoing(rank)]
        )
        problems += await self._each([("fill the devices with KV", self._workers.grow_kv)])
        return problems + await self._each([("read the ledger", self._read_ledger)])

    async def _keep(self, txn: str) -> None:
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
        problems = await self._each(self._undos)
        if self._txn is not None:
            txn = self._txn
            problems += await self._each([("roll back the HMM transaction", lambda: self._roll_back_memory(txn))])
            problems += await self._each([("give KV its memory back", self._workers.grow_kv)])
        if problems:
            held = f"{reason}; epoch {self._plan.before.epoch} goes on, but the undo was incomplete"
            self._operation.end(Phase.FAILED, f"{held}: {'; '.join(problems)}")
        else:
            self._operation.end(Phase.ROLLED_BACK, reason)

    async def _each(self, steps: Sequence[Step]) -> list[str]:
        """Do all steps together, each within the finish deadline; a failure of one does not stop another.

        Returns:
            One sentence for each step that failed.
        """

        async def attempt(what: str, step: Callable[[], Awaitable[None]]) -> str | None:
            try:
                await _within(self._config.finish_deadline_s, what, [_awaited(step)])
            except Exception as error:
                logger.error("operation %s: could not %s", self._operation.operation_id, what, exc_info=True)
                return f"could not {what}: {_text(error)}"
            return None

        results = await asyncio.gather(*(attempt(what, step) for what, step in steps))
        return [result for result in results if result is not None]


async def _awaited(step: Callable[[], Awaitable[None]]) -> None:
    await step()


async def _within(seconds: float | None, what: str, steps: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run steps together. The first failure, the deadline or a cancellation ends the others before it is raised.

    Raises:
        PhaseTimeout: the deadline was over first.
    """
    tasks = [asyncio.ensure_future(step) for step in steps]
    if not tasks:
        return
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        late = [task for task in tasks if not task.done()]
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late)
    errors = [task.exception() for task in tasks if not task.cancelled()]
    for error in errors:
        if error is not None:
            raise error
    if late:
        raise PhaseTimeout(f"{what} took longer than {seconds:g} s")
    if len(errors) < len(tasks):
        raise ElasticMoEError(f"{what} was cancelled from elsewhere")


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, ElasticMoEError) else f"{type(error).__name__}: {error}"
