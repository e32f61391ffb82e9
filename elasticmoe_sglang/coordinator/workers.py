"""The coordinator's `WorkersPort` on real workers: through the IMM, the workers' agents and SGLang's message path."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from elasticmoe_sglang.comm.commit_barrier import COORDINATOR, CommitBarrier, Decision
from elasticmoe_sglang.comm.control_page import ControlPage
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator import steps as s
from elasticmoe_sglang.coordinator.hot_standbys import HotStandbys
from elasticmoe_sglang.coordinator.incarnations import Incarnations
from elasticmoe_sglang.coordinator.kv_balancer import KvBalancer
from elasticmoe_sglang.coordinator.migration import OutputFences, migrate, snapshot
from elasticmoe_sglang.coordinator.ports import SglangPort
from elasticmoe_sglang.coordinator.proposal import commit_id
from elasticmoe_sglang.coordinator.status import CommitReport, Moved, PullReport, RankInfo, Withdrawal
from elasticmoe_sglang.coordinator.worker_channel import Incoming, WorkerChannel
from elasticmoe_sglang.errors import CommitError, HmmUnavailable, WorkerError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.planner import Cause, ColumnMove, TransitionPlan, View
from elasticmoe_sglang.wire import to_coordinator, to_imm, to_worker

logger = logging.getLogger(__name__)

# Wait this long for the measured pauses; the workers of an idle server report none.
_PAUSE_REPORT_S = 0.1


class _Pulling:
    """Ranks of one device pull one after the other, so that a column that several of them get is copied once."""

    def __init__(self) -> None:
        self._locks: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._pulled: dict[int, tuple[str, set[int]]] = {}

    @contextlib.asynccontextmanager
    async def turn(self, device: int, txn: str) -> AsyncIterator[set[int]]:
        """Within it no other rank of the device pulls. The columns that others have pulled there in this transaction;
        what is added counts."""
        async with self._locks[device]:
            known, columns = self._pulled.get(device, ("", set()))
            if known != txn:
                self._pulled[device] = txn, (columns := set())
            yield columns


class Workers:
    """Implements `WorkersPort`. Runs in the coordinator's event loop.

    Attributes:
        hot: workers that wait to join.
        on_event: given what happens to workers, for the engine; nothing is lost before it is set, because what is known
            by then is in `pids`.
    """

    def __init__(
        self, *, config: ElasticConfig, channel: WorkerChannel, hmm: HmmClient, control: ControlPage, sglang: SglangPort
    ) -> None:
        self._config = config
        self._channel = channel
        self._hmm = hmm
        self._control = control
        self._kv = KvBalancer(config, channel, hmm, resize_s=config.commit_deadline_s)
        self._sglang = sglang
        self.pids: dict[int, int] = {}
        self._population = to_imm.Population(ranks={}, standbys=[], starting=[])
        self._hellos: dict[int, to_coordinator.Hello] = {}
        self._first_uses: Counter[int] = Counter()
        self._joining: set[int] = set()
        self._retiring: set[int] = set()
        self.fences = OutputFences()
        self._opened: tuple[str, set[str]] = ("", set())
        self._reported: tuple[str, set[int]] = ("", set())
        self._resends = 0
        self._incarnations = Incarnations()
        self._barrier = CommitBarrier(control, COORDINATOR)
        self._pulling = _Pulling()
        self._pauses: dict[int, float] = {}
        self.hot = HotStandbys(
            config,
            channel,
            self._kv,
            pids=self.pids,
            view=self.view,
            next_incarnation=self._incarnations.next,
            clean_up=self._clean_up,
        )
        self.on_event: Callable[[s.Event], None] = lambda _event: None

    # -- what is known ------------------------------------------------------------------------------------------

    def message(self, message: Incoming) -> None:
        """Update what is known about the workers, and tell the engine; called for every message."""
        match message:
            case to_imm.Population():
                # Not who serves a rank: an IMM that has just begun does not know. Assignments and exits tell that.
                self._population = message
                self.on_event(s.StandbysReady(count=len(message.standbys)))
            case to_imm.Assigned(rank=rank, pid=pid, incarnation=incarnation):
                self.pids[rank] = pid
                self._incarnations.assigned(pid, incarnation)
                self.on_event(s.WorkerUp(rank=rank, pid=pid))
            case to_coordinator.WorkerExited(rank=rank, pid=pid):
                if self.pids.get(rank) == pid:
                    del self.pids[rank]
                serving = rank in self.view().ranks and rank not in self._joining
                self._incarnations.exited(rank, pid, message.status, serving=serving)
                self._hellos.pop(rank, None)
                self._kv.forget(rank)
                self.hot.exited(rank)
                if rank in self.view().ranks:
                    level = logging.INFO if message.status == 0 else logging.ERROR  # 0: at a server's ordinary end
                    logger.log(level, "the worker of active rank %d (pid %d) %s", rank, pid, message.how)
                self.on_event(s.WorkerGone(rank=rank, pid=pid))
            case to_coordinator.Hello():
                self._hellos[message.rank] = message
                self._first_uses.pop(message.rank, None)
                self._kv.learn(message.rank, message.kv)
            case to_coordinator.Committed(rank=rank, operation_id=operation_id):
                if operation_id == self._reported[0]:
                    self._reported[1].add(rank)
            case to_coordinator.Paused():
                self._pauses[message.rank] = message.pause_ms
            case to_coordinator.KernelLoaded():
                self._first_uses[message.rank] += 1
            case to_coordinator.Broken():
                self.on_event(s.RankBroken(rank=message.rank, epoch=message.epoch, culprit=message.culprit))
            case _:
                pass

    def announce(self) -> None:
        """Tell the engine what is known already."""
        self.message(self._population)

    def view(self) -> View:
        return self._control.read_view()

    def ranks(self) -> Sequence[RankInfo]:
        return snapshot(
            self._config,
            active=self.view().ranks,
            pids=self.pids,
            population=self._population,
            joining=self._joining,
            retiring=self._retiring,
            hot=self.hot.ready,
            booting=self.hot.booting,
            hellos=self._hellos,
            first_uses=self._first_uses,
            kv=self._control.kv,
            kv_bytes=self._kv.held(),
        )

    async def kill(self, rank: int, pid: int, *, stalled: bool) -> None:
        if self.pids.get(rank) == pid:
            why = "has stalled" if stalled else "shares a replica with a lost rank"
            logger.error("the worker of rank %d (pid %d) %s; killing it", rank, pid, why)
            if stalled:
                self._incarnations.stalled(pid)
            self._channel.tell_imm(to_imm.KillWorker(rank=rank))

    async def count_routed(self, ranks: Sequence[int]) -> Mapping[int, Sequence[int]]:
        ask = to_worker.CountRouted(operation_id=f"routing-{time.monotonic_ns()}")
        replies = await asyncio.gather(*(self._channel.ask(rank, ask, to_worker.Routed) for rank in ranks))
        return {reply.rank: reply.tokens for reply in replies}

    # -- KV -----------------------------------------------------------------------------------------------------

    def least_kv_bytes(self) -> int:
        return self._kv.least_bytes()

    async def drop_kv(self, ranks: Sequence[int]) -> None:
        await self._kv.drop(ranks)

    async def shrink_kv(self, plan: TransitionPlan) -> Mapping[int, int]:
        return await self._kv.shrink_kv(plan, ranks=plan.after.ranks, joining=plan.joining)

    async def grow_kv(self) -> None:
        await self._kv.grow_kv(self.view)

    async def balance_kv(self, when: Callable[[], bool]) -> None:
        """Grow KV into memory that is released between changes, while `when` returns True; runs until cancelled."""
        await self._kv.run(lambda: self.view() if when() else None)

    # -- prepare ------------------------------------------------------------------------------------------------

    async def boot(self, join_spec: to_worker.JoinSpec) -> PullReport:
        rank = join_spec.rank
        self._joining.add(rank)
        hello = await self.hot.join(join_spec) or await self._boot(join_spec)
        if hello.checkpoint_bytes:
            logger.warning("rank %d read %d bytes of the checkpoint to join", hello.rank, hello.checkpoint_bytes)
        return PullReport(columns=len(join_spec.held), bytes=hello.pulled_bytes)

    async def _boot(self, join_spec: to_worker.JoinSpec) -> to_coordinator.Hello:
        rank = join_spec.rank
        self._channel.forget(lambda message: getattr(message, "rank", None) == rank)
        spec = msgspec.structs.replace(join_spec, incarnation=self._incarnations.next())
        self._channel.tell_imm(to_imm.Assign(join_spec=spec))
        return await self._channel.wait_for(to_coordinator.Hello, rank=rank)

    async def pull(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> PullReport:
        device = self._config.device_of(rank)
        async with self._pulling.turn(device, txn) as pulled_here:
            placed = {(column, self._config.device_of(holder)) for column, holder in self.view().placement.held()}
            near = pulled_here | {column for column, where in placed if where == device}
            sources = {
                move.column: device if move.column in near else self._config.device_of(move.source) for move in moves
            }
            request = to_worker.PullColumns(operation_id=txn, txn=txn, sources=sources)
            pulled = await self._channel.ask(rank, request, to_worker.Pulled)
            pulled_here.update(sources)
        return PullReport(columns=pulled.columns, bytes=pulled.bytes)

    async def drop(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> None:
        await self._unmap(rank, [move.column for move in moves], operation_id=f"drop-{txn}")

    async def _unmap(self, rank: int, columns: Sequence[int], *, operation_id: str) -> None:
        if rank in self.pids:  # otherwise the worker has exited, and its mappings ended with it
            message = to_worker.DropColumns(operation_id=operation_id, columns=tuple(columns))
            try:
                await self._channel.ask(rank, message, to_worker.Dropped)
            except WorkerError:
                if rank in self.pids:
                    raise

    # -- commit -------------------------------------------------------------------------------------------------

    async def commit_ranks(self, plan: TransitionPlan, attempt: int, expires: float) -> CommitReport:
        command = to_worker.CommitCommand(
            operation_id=commit_id(plan, attempt),
            before=plan.before.ranks,
            members=plan.after.ranks,
            lost=plan.lost,
            epoch=plan.after.epoch,
            attempt=attempt,
            placement=plan.after.owners,
            copies=plan.after.placement.copies,
            expires=expires,
            parking=self.hot.choose(plan.retiring),
        )
        self._pauses = {}
        self._reported = (command.operation_id, set())
        if plan.cause is Cause.LOSS:
            # SGLang's broadcast does not reach anybody: its collectives failed with the lost rank.
            for rank in plan.survivors:
                await self._channel.tell_worker(rank, command)
            opened = await self._sglang.send_recover_route(command.operation_id, command.members)
            self._opened = (command.operation_id, opened)
            voters = plan.participants
        else:
            await self._sglang.send_command(command)
            voters = plan.before.ranks
        reports = await asyncio.gather(
            *(
                self._channel.wait_for(to_coordinator.Committed, rank=rank, operation_id=command.operation_id)
                for rank in voters
            )
        )
        absent = [report for report in reports if not report.committed]
        if absent:
            reason = next((report.reason for report in absent if report.reason), "the commit barrier decided to abort")
            return CommitReport(committed=False, reason=reason)
        self._committed(plan)
        return CommitReport(committed=True, pause_ms={report.rank: report.barrier_ms for report in reports})

    async def withdraw(self, plan: TransitionPlan, attempt: int) -> Withdrawal:
        committed = self._barrier.withdraw(plan.after.epoch, attempt) is Decision.COMMIT
        if committed:
            self._committed(plan)
        operation_id, reported = self._reported
        if operation_id != commit_id(plan, attempt):
            reported = set()
        absent = tuple(rank for rank in plan.participants if rank in self.pids and rank not in reported)
        return Withdrawal(committed=committed, absent=absent)

    def _committed(self, plan: TransitionPlan) -> None:
        view = self.view()
        if view != plan.after:
            raise CommitError(
                f"ranks {list(plan.after.ranks)} committed, but the control page says {list(view.ranks)}",
                epoch=view.epoch,
                operation=commit_id(plan, 0),
            )
        self._joining -= set(plan.joining)
        self._retiring |= set(plan.retiring)

    async def pauses(self, ranks: Sequence[int]) -> Mapping[int, float]:
        deadline = time.monotonic() + _PAUSE_REPORT_S
        while time.monotonic() < deadline and not set(ranks) <= set(self._pauses):
            await asyncio.sleep(0.01)
        return dict(self._pauses)

    # -- finish -------------------------------------------------------------------------------------------------

    async def route(self, ranks: Sequence[int]) -> None:
        await self._sglang.send_route(ranks)

    async def migrate(self, rank: int, operation_id: str) -> Moved:
        retired = await self._channel.wait_for(to_coordinator.Retired, rank=rank, operation_id=operation_id)
        return await migrate(self._channel, self.fences, retired, self._config.mates_of)

    async def spread_waiting(self, ranks: Sequence[int], joining: Sequence[int]) -> int:
        view = self.view()
        self._resends += 1
        ask = to_worker.GiveUpWaiting(
            operation_id=f"spread-{self._resends}", epoch=view.epoch, share=len(joining) / len(view.ranks)
        )

        async def given(rank: int) -> list[str]:
            try:
                return (await self._channel.ask(rank, ask, to_worker.GaveUp)).rids
            except WorkerError:  # it has died, and the recovery sends again what was there
                return []

        rids = {rid for each in await asyncio.gather(*map(given, ranks)) for rid in each}
        return await self._sglang.send_again(rids, gone=(), suspect=False, ranks=joining)

    async def resend(self, operation_id: str, forget: Sequence[int]) -> int:
        members = self.view().ranks
        leading = self._config.leaders_of(members)  # a replica's requests are all that this rank has
        known, opened = self._opened
        if operation_id != known or not known:
            self._resends += 1
            operation_id = f"resend-{self._resends}"
            count = to_worker.CountRequests(operation_id=operation_id, forget=tuple(forget))
            for member in members:
                await self._channel.tell_worker(member, count)
            opened = await self._sglang.send_recover_route(operation_id, members)
        reports = await asyncio.gather(
            *(self._channel.wait_for(to_worker.Counted, rank=rank, operation_id=operation_id) for rank in leading)
        )
        # A request that ended on a member is missing in its report, and stays open until its last output has passed.
        if not await self.fences.wait(operation_id, leading):
            raise WorkerError("the output of a rank did not pass in time", operation=operation_id)
        here = {rid for report in reports for rid in report.rids}
        suspect = self._incarnations.take_suspicion()
        return await self._sglang.send_again(opened - here, gone=self._incarnations.gone, suspect=suspect)

    async def dismiss(self, rank: int) -> None:
        if rank not in self._retiring:
            await self._cancel_join(rank)
            return
        if rank in self.hot.parking and rank in self.pids and await self.hot.park(rank):
            self._retiring.discard(rank)
            return
        if rank in self.pids:
            await self._channel.wait_for(to_coordinator.WorkerExited, rank=rank, exits=False)
        self._retiring.discard(rank)
        await self._kv.drop([rank])

    async def _clean_up(self, rank: int) -> None:
        """Release what an inactive rank's worker, which has ended, had for itself; what it had for a change goes with
        that."""
        await self._kv.drop([rank], settled=True)
        await self._release_dense(self._config.device_of(rank))

    async def _release_dense(self, device: int) -> None:
        """What no active rank and no hot standby of the device uses of its dense weights."""
        here = [rank for rank in (*self.view().ranks, *self.hot.ranks) if self._config.device_of(rank) == device]
        used = {self._config.shard_of(rank) for rank in here}
        if len(used) == self._config.attention_tp:
            return
        found = await asyncio.to_thread(self._hmm.lookup, kind="dense", device=device)
        unused = [block.block_id for block in found if block.shard not in used]
        if unused:
            await asyncio.to_thread(self._hmm.release, unused)

    async def _cancel_join(self, rank: int) -> None:
        try:
            self._channel.tell_imm(to_imm.KillWorker(rank=rank))  # also one that waits for another IMM to assign it
            if rank in self.pids:
                await self._channel.wait_for(to_coordinator.WorkerExited, rank=rank, exits=False)
            with contextlib.suppress(HmmUnavailable):  # the next HMM never hears of it
                await self._kv.drop([rank], settled=True)  # what it had as a hot standby
        finally:
            self._joining.discard(rank)

    async def release(self, rank: int, columns: Sequence[int]) -> None:
        view = self.view()
        if rank in view.ranks:
            await self._unmap(rank, columns, operation_id=f"release-{rank}-{time.monotonic_ns()}")
        device = self._config.device_of(rank)
        # A column that another rank of the same device holds keeps its memory.
        here = {column for column, holder in view.placement.held() if self._config.device_of(holder) == device}
        gone = [column for column in columns if column not in here]
        if gone:
            blocks = await asyncio.to_thread(self._hmm.lookup, kind="column", device=device, columns=gone)
            if blocks:
                await asyncio.to_thread(self._hmm.release, [block.block_id for block in blocks])
        await self._release_dense(device)

    # -- another HMM --------------------------------------------------------------------------------------------

    async def offer_memory(self) -> int:
        """Have every worker offer the memory it maps to the HMM that answers now.

        Returns:
            Number of blocks that the HMM did not have yet.
        """
        operation_id = f"offer-{time.monotonic_ns()}"
        ranks = [rank for rank in (*self.view().ranks, *self.hot.ready) if rank in self.pids]
        message = to_worker.OfferMemory(operation_id=operation_id)
        offered = await asyncio.gather(*(self._channel.ask(rank, message, to_worker.Offered) for rank in ranks))
        return sum(reply.blocks for reply in offered)
