"""The coordinator's `WorkersPort` on real workers: through the IMM, the workers' agents and SGLang's message path."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from elasticmoe_sglang.comm.commit_barrier import COORDINATOR, Attempts, CommitBarrier, Decision
from elasticmoe_sglang.comm.control_page import ControlPage
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.kv_balancer import KvBalancer
from elasticmoe_sglang.coordinator.migration import Departure, OutputFences, migrate, migrations_done, snapshot
from elasticmoe_sglang.coordinator.ports import SglangPort
from elasticmoe_sglang.coordinator.status import CommitReport, PullReport, RankInfo
from elasticmoe_sglang.coordinator.worker_channel import Incoming, WorkerChannel
from elasticmoe_sglang.errors import ElasticMoEError, WorkerError
from elasticmoe_sglang.event_loop import run_together
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.planner import ColumnMove, Placement, ScalePlan
from elasticmoe_sglang.planner.recovery import RecoveryPlan
from elasticmoe_sglang.wire import to_coordinator, to_imm, to_worker
from elasticmoe_sglang.wire.to_hmm import Kind

logger = logging.getLogger(__name__)

# Wait this long after a commit for the measured pauses; the workers of an idle server report none.
_PAUSE_REPORT_S = 0.1
# A worker that is still alive so long after others missed it in a collective counts as stalled.
_STALLED_S = 0.3
_CANCEL_S = 5.0
NOBODY = -1
"""In `CountRequests`: no retiring rank died."""


class Workers:
    """Implements `WorkersPort`, and recovery from a worker's death. Runs in the coordinator's event loop.

    Args:
        placement: that of the server's start.
    """

    def __init__(
        self,
        *,
        config: ElasticConfig,
        channel: WorkerChannel,
        hmm: HmmClient,
        control: ControlPage,
        sglang: SglangPort,
        placement: Placement,
    ) -> None:
        self._config = config
        self._channel = channel
        self._hmm = hmm
        self._control = control
        self._kv = KvBalancer(config, channel, hmm, resize_s=config.commit_deadline_s)
        self._placement = placement
        self._sglang = sglang
        self._pids: dict[int, int] = {}
        self._population = to_imm.Population(ranks={}, standbys=[], starting=[])
        self._hellos: dict[int, to_coordinator.Hello] = {}
        self._first_uses: Counter[int] = Counter()
        self._joining: set[int] = set()
        self._departures: dict[int, Departure] = {}
        self.fences = OutputFences()
        self._resending = asyncio.Lock()
        self._attempts = Attempts()
        self._barrier = CommitBarrier(control, COORDINATOR)
        self.pauses: dict[int, float] = {}

    # -- what is known ------------------------------------------------------------------------------------------

    def message(self, message: Incoming) -> None:
        """Update what is known about the workers; called for every message."""
        if isinstance(message, to_imm.Population):
            self._population, self._pids = message, dict(message.ranks)
        elif isinstance(message, to_imm.Assigned):
            self._pids[message.rank] = message.pid
        elif isinstance(message, to_coordinator.WorkerExited):
            self._pids.pop(message.rank, None)
            self._hellos.pop(message.rank, None)
            self._kv.forget(message.rank)
            self._check_loss(message)
        elif isinstance(message, to_coordinator.Hello):
            self._hellos[message.rank] = message
            self._first_uses.pop(message.rank, None)
            self._kv.learn(message.rank, message.kv)
        elif isinstance(message, to_coordinator.Paused):
            self.pauses[message.rank] = message.pause_ms
        elif isinstance(message, to_coordinator.KernelLoaded):
            self._first_uses[message.rank] += 1
        elif isinstance(message, to_coordinator.Broken) and message.culprit in self._pids.keys() - self._joining:
            # Either it is dead and its exit will be reported, or it has stalled and has to be killed.
            culprit = message.culprit
            asyncio.get_running_loop().call_later(_STALLED_S, self._end_stalled, culprit, self._pids[culprit])

    def _check_loss(self, message: to_coordinator.WorkerExited) -> None:
        expected = message.rank in self._departures or message.rank in self._joining
        if not expected and message.rank in self.membership().ranks:
            self._sglang.rank_lost(
                message.rank,
                f"the worker of active rank {message.rank} (pid {message.pid}) exited with status {message.status}",
            )

    def _end_stalled(self, rank: int, pid: int) -> None:
        if self._pids.get(rank) == pid:
            logger.error("the worker of rank %d (pid %d) has stalled; killing it", rank, pid)
            self._channel.tell_imm(to_imm.KillWorker(rank=rank))

    def membership(self) -> Membership:
        return self._control.read_membership()

    def ranks(self) -> Sequence[RankInfo]:
        return snapshot(
            self._config,
            active=self.membership().ranks,
            pids=self._pids,
            population=self._population,
            joining=self._joining,
            retiring=self._departures.keys(),
            hellos=self._hellos,
            first_uses=self._first_uses,
            kv=self._control.kv,
            kv_bytes=self._kv.held(),
        )

    # -- KV -----------------------------------------------------------------------------------------------------

    def least_kv_bytes(self) -> int:
        return self._kv.least_bytes()

    async def shrink_kv(self, plan: ScalePlan) -> Mapping[int, int]:
        return await self._kv.shrink_kv(plan, ranks=plan.after.ranks, joining=plan.joining, retiring=plan.retiring)

    async def grow_kv(self) -> None:
        await self._kv.grow_kv(lambda: (self.membership().ranks, self._placement))

    async def balance_kv(self, when: Callable[[], bool]) -> None:
        """Grow KV into memory that is released between changes, while `when` returns True; runs until cancelled."""
        await self._kv.run(lambda: (self.membership().ranks, self._placement) if when() else None)

    # -- prepare ------------------------------------------------------------------------------------------------

    async def boot(self, join_spec: to_worker.JoinSpec) -> PullReport:
        hello = await self._assign(join_spec)
        if hello.checkpoint_bytes:
            logger.warning("rank %d read %d bytes of the checkpoint to join", hello.rank, hello.checkpoint_bytes)
        return PullReport(columns=join_spec.placement.count(join_spec.rank), bytes=hello.pulled_bytes)

    async def _assign(self, join_spec: to_worker.JoinSpec) -> to_coordinator.Hello:
        """Assign a standby worker to a rank, and wait until it has booted."""
        rank = join_spec.rank
        self._joining.add(rank)
        self._channel.forget(lambda message: getattr(message, "rank", None) == rank)
        self._channel.tell_imm(to_imm.Assign(join_spec=join_spec))
        return await self._channel.wait_for(to_coordinator.Hello, rank=rank)

    async def pull(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> PullReport:
        pulled = await self._pull(rank, moves, operation_id=txn, txn=txn)
        return PullReport(columns=pulled.columns, bytes=pulled.bytes)

    async def _pull(self, rank: int, moves: Sequence[ColumnMove], *, operation_id: str, txn: str) -> to_worker.Pulled:
        sources = {move.column: self._config.device_of(move.source) for move in moves}
        request = to_worker.PullColumns(operation_id=operation_id, txn=txn, sources=sources)
        return await self._channel.ask(rank, request, to_worker.Pulled)

    async def drop(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> None:
        await self._unmap(rank, [move.column for move in moves], operation_id=f"drop-{txn}")

    async def _unmap(self, rank: int, columns: Sequence[int], *, operation_id: str) -> None:
        if rank in self._pids:  # otherwise the worker has exited, and its mappings ended with it
            message = to_worker.DropColumns(operation_id=operation_id, columns=tuple(columns))
            await self._channel.ask(rank, message, to_worker.Dropped)

    # -- commit -------------------------------------------------------------------------------------------------

    async def commit(self, plan: ScalePlan, deadline_s: float) -> CommitReport:
        attempt = self._attempts.next(plan.after.epoch)
        operation_id = f"{plan.after.epoch}.{attempt}"
        command = to_worker.CommitCommand(
            operation_id=operation_id,
            before=plan.before.ranks,
            members=plan.after.ranks,
            epoch=plan.after.epoch,
            attempt=attempt,
            placement=plan.placement_after.owners,
            expires=time.monotonic() + deadline_s,
        )
        self.pauses = {}
        for rank in plan.retiring:
            self._departures[rank] = Departure(operation_id=operation_id, survivors=plan.survivors)
        try:
            await self._sglang.send_command(command)
            reports = await asyncio.gather(
                *(
                    self._channel.wait_for(to_coordinator.Committed, rank=rank, operation_id=operation_id)
                    for rank in command.before
                )
            )
        except BaseException:
            # Who gives up decides: after this no rank can commit, however late it comes.
            decision = self._barrier.withdraw(plan.after.epoch, attempt)
            await self._settle(plan, decision is Decision.COMMIT)
            raise
        committed = all(report.committed for report in reports)
        await self._settle(plan, committed)
        if not committed:
            reason = next((report.reason for report in reports if report.reason), "the commit barrier decided to abort")
            return CommitReport(committed=False, reason=reason)
        await self._wait_for_pauses(plan)
        pauses = {report.rank: self.pauses.get(report.rank, report.barrier_ms) for report in reports}
        return CommitReport(committed=True, pause_ms=pauses)

    async def _settle(self, plan: ScalePlan, committed: bool) -> None:
        if committed:
            self._placement = plan.placement_after
            self._joining -= set(plan.joining)
            # At once, not in the finishing phase: clients of the migrated requests are waiting.
            for rank in plan.retiring:
                departure = self._departures[rank]
                departure.migration = asyncio.get_running_loop().create_task(self._migrate(rank, departure))
        else:
            for rank in plan.retiring:
                self._departures.pop(rank, None)
        for rank in self.membership().ranks:
            # Until now the exit of a joining or retiring rank's worker was no loss; this rank is active afterwards.
            if rank not in self._pids:
                self._sglang.rank_lost(rank, f"the worker of rank {rank} exited during a change that keeps the rank")
        await self._sglang.send_route((plan.after if committed else plan.before).ranks)

    async def _wait_for_pauses(self, plan: ScalePlan) -> None:
        deadline = time.monotonic() + _PAUSE_REPORT_S
        while time.monotonic() < deadline and not set(plan.survivors) <= set(self.pauses):
            await asyncio.sleep(0.01)

    # -- finish -------------------------------------------------------------------------------------------------

    async def release(self, rank: int, columns: Sequence[int]) -> None:
        await self._unmap(rank, columns, operation_id=f"release-{rank}-{time.monotonic_ns()}")
        device = self._config.device_of(rank)
        # A column that moved to another rank of the same device keeps its memory.
        gone = [c for c in columns if self._config.device_of(self._placement.owners[c]) != device]
        if gone:
            await self._release_blocks(kind="column", device=device, columns=gone)

    async def dismiss(self, rank: int) -> int:
        departure = self._departures.get(rank)
        if departure is None or departure.migration is None:
            await self._cancel_join(rank)
            return 0
        try:
            moved = await departure.migration
            if rank in self._pids:
                await self._channel.wait_for(to_coordinator.WorkerExited, rank=rank, exits=False)
        finally:
            # Whatever became of its requests: a later worker of this rank is none that retires.
            self._departures.pop(rank, None)
        await self._release_dense(rank)
        await self._kv.drop([rank])
        return moved

    async def _migrate(self, rank: int, departure: Departure) -> int:
        """Have the survivors resume the retiring rank's requests once its last tokens have been delivered."""
        try:
            retired = await self._channel.wait_for(
                to_coordinator.Retired, rank=rank, operation_id=departure.operation_id
            )
        except WorkerError as error:
            logger.error("the worker of a retiring rank died while migrating requests; they are sent again: %s", error)
            departure.died = True
            # Requests that another retiring rank is migrating are on no rank now, and must not be sent again.
            await migrations_done(self._departures.values())
            return await self._resend(f"resend-{departure.operation_id}-{rank}", forget=rank)
        return await migrate(self._channel, self.fences, departure, retired)

    # -- another HMM ----------------------------------------------------------------------------------------------

    async def offer_memory(self) -> int:
        """Have every worker offer the memory it maps to the HMM that answers now.

        Returns:
            Number of blocks that the HMM did not have yet.
        """
        operation_id = f"offer-{time.monotonic_ns()}"
        ranks = [rank for rank in self.membership().ranks if rank in self._pids]
        message = to_worker.OfferMemory(operation_id=operation_id)
        offered = await asyncio.gather(*(self._channel.ask(rank, message, to_worker.Offered) for rank in ranks))
        return sum(reply.blocks for reply in offered)

    # -- a rank's death -----------------------------------------------------------------------------------------

    async def recover(self, plan: RecoveryPlan, deadline_s: float) -> int:
        """Carry out a recovery plan; returns how many of the dead ranks' requests were sent again.

        Raises:
            WorkerError: recovery failed, for example because another worker died: make a new plan.
        """
        members = plan.membership.ranks
        attempt = self._attempts.next(plan.membership.epoch)
        operation_id = f"recover-{plan.membership.epoch}.{attempt}"
        try:
            await self._prepare_recovery(plan, operation_id, attempt)
            command = to_worker.Recover(
                operation_id=operation_id,
                members=members,
                epoch=plan.membership.epoch,
                attempt=attempt,
                placement=plan.placement.owners,
                expires=time.monotonic() + deadline_s,
            )
            for rank in plan.survivors:
                await self._channel.tell_worker(rank, command)
            opened = await self._sglang.send_recover_route(operation_id, members)
            here = await self._recovered(operation_id, members)
        except BaseException:
            if self._barrier.withdraw(plan.membership.epoch, attempt) is Decision.COMMIT:
                self._recovery_committed(plan)
            else:
                await self._cancel_joins(plan.replaced)
                await self._drop_pulled(plan, operation_id)
            raise
        self._recovery_committed(plan)
        sent = await self._sglang.send_again(opened - here)
        try:
            await self._release_dead(plan)
            await self.grow_kv()
        except (ElasticMoEError, OSError) as error:  # the new epoch serves; its memory is tidied up later
            logger.error("epoch %d serves, but memory was not released: %s", plan.membership.epoch, error)
        return sent

    async def _prepare_recovery(self, plan: RecoveryPlan, operation_id: str, attempt: int) -> None:
        """Boot replacements and pull columns. The first failure ends the other steps."""
        await migrations_done(self._departures.values())
        await self._kv.drop(plan.dead)
        first = await self._kv.shrink_kv(plan, ranks=plan.membership.ranks, joining=plan.replaced)
        pulls = [
            self._pull_for_recovery(rank, moves, operation_id)
            for rank in plan.survivors
            if (moves := plan.incoming(rank))
        ]
        boots = [self._replace(rank, plan, operation_id, attempt, first.get(rank, 0)) for rank in plan.replaced]
        await run_together(None, "recovering", [*boots, *pulls])

    async def _pull_for_recovery(self, rank: int, moves: Sequence[ColumnMove], operation_id: str) -> None:
        await self._pull(rank, moves, operation_id=operation_id, txn="")

    def _recovery_committed(self, plan: RecoveryPlan) -> None:
        self._placement = plan.placement
        self._joining -= set(plan.replaced)

    async def _cancel_joins(self, ranks: Sequence[int]) -> None:
        """Before another attempt: a replacement that still boots would keep its rank from the next one."""
        for rank in ranks:
            try:
                await asyncio.wait_for(self._cancel_join(rank), _CANCEL_S)
            except (ElasticMoEError, asyncio.TimeoutError) as error:
                logger.error("the worker that was to replace rank %d could not be ended: %s", rank, error)

    async def _drop_pulled(self, plan: RecoveryPlan, operation_id: str) -> None:
        """Before another attempt: a survivor cannot pull a column that it has mapped for this one."""
        dropped = await asyncio.gather(
            *(
                asyncio.wait_for(self.drop(rank, operation_id, moves), _CANCEL_S)
                for rank in plan.survivors
                if (moves := plan.incoming(rank))
            ),
            return_exceptions=True,
        )
        for error in dropped:
            if isinstance(error, (ElasticMoEError, asyncio.TimeoutError)):
                logger.warning("columns of the attempt that failed stay mapped: %s", error)
            elif error is not None:
                raise error

    async def resend_open(self) -> int:
        """Send again the requests that are open and on no rank; returns how many."""
        epoch = self.membership().epoch
        return await self._resend(f"resend-{epoch}.{self._attempts.next(epoch)}", forget=NOBODY)

    async def _recovered(self, operation_id: str, members: Sequence[int]) -> set[str]:
        reports = await asyncio.gather(
            *(self._channel.wait_for(to_worker.Recovered, rank=rank, operation_id=operation_id) for rank in members)
        )
        absent = [report.rank for report in reports if not report.committed]
        if absent:
            raise WorkerError(f"ranks {absent} did not commit at the commit barrier", operation=operation_id)
        # A request that ended on a member is missing in its report, and stays open until its last output has passed.
        await self.fences.wait(operation_id, members)
        return {rid for report in reports for rid in report.rids}

    async def _replace(self, rank: int, plan: RecoveryPlan, operation_id: str, attempt: int, kv_chunks: int) -> None:
        """Assign a standby worker to the dead rank, whose weights are still in its device's memory."""
        join_spec = to_worker.JoinSpec(
            rank=rank,
            members=plan.membership.ranks,
            epoch=plan.membership.epoch,
            joining_rank=True,
            placement=plan.placement.owners,
            attempt=attempt,
            kv_chunks=kv_chunks,
            operation_id=operation_id,
        )
        await self._assign(join_spec)

    async def _resend(self, operation_id: str, *, forget: int) -> int:
        """Send again the requests that are open and on no rank, without a change of membership."""
        async with self._resending:  # a worker reports its requests for one operation at a time
            members = self.membership().ranks
            for member in members:
                await self._channel.tell_worker(
                    member, to_worker.CountRequests(operation_id=operation_id, forget=forget)
                )
            opened = await self._sglang.send_recover_route(operation_id, members)
            return await self._sglang.send_again(opened - await self._recovered(operation_id, members))

    async def _release_dead(self, plan: RecoveryPlan) -> None:
        for rank in plan.dead:
            if rank not in plan.replaced:
                await self.release(rank, [move.column for move in plan.moves if move.source == rank])
                await self._release_dense(rank)

    async def _cancel_join(self, rank: int) -> None:
        try:
            if rank in self._pids:
                self._channel.tell_imm(to_imm.KillWorker(rank=rank))
                await self._channel.wait_for(to_coordinator.WorkerExited, rank=rank, exits=False)
        finally:
            self._joining.discard(rank)

    async def _release_dense(self, rank: int) -> None:
        """Release the dense weights of the rank's device if no active rank is left on it."""
        device = self._config.device_of(rank)
        if all(self._config.device_of(other) != device for other in self.membership().ranks):
            await self._release_blocks(kind="dense", device=device)

    async def _release_blocks(self, *, kind: Kind, device: int, columns: Sequence[int] | None = None) -> None:
        blocks = await asyncio.to_thread(self._hmm.lookup, kind=kind, device=device, columns=columns)
        if blocks:
            await asyncio.to_thread(self._hmm.release, [block.block_id for block in blocks])
