"""The coordinator's `WorkersPort` over the real processes: IMM, rank agents, and SGLang's message ways for the
commit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from elasticmoe_sglang.comm.control_page import ControlPage
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.kv_pools import KvPools
from elasticmoe_sglang.coordinator.migration import Departure, OutputFences, migrate, migrations_done, snapshot
from elasticmoe_sglang.coordinator.ports import CommitReport, PullReport
from elasticmoe_sglang.coordinator.status import RankInfo
from elasticmoe_sglang.coordinator.worker_channel import Incoming, WorkerChannel
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.hmm.client import AsyncHmmClient
from elasticmoe_sglang.planner import ColumnMove, Placement, ScalePlan
from elasticmoe_sglang.planner.recovery import RecoveryPlan
from elasticmoe_sglang.wire import to_coordinator, to_imm, to_worker

logger = logging.getLogger(__name__)

# How long after the commit the ranks' measured pauses are waited for; an idle server reports none.
_PAUSE_REPORT_S = 0.1
# How long a rank that others miss may live on before it counts as stalled.
_STALLED_S = 0.3


class Workers:
    """Args:
    send_command: puts an encoded CommitCommand on SGLang's way to all ranks.
    send_route: tells SGLang's controller which ranks get new requests.
    send_recover_route: the same after a rank's death, with a fence into every rank's queue; returns the requests
        that were open when it was sent.
    send_again: sends these requests to ranks again, as far as they are still open; returns how many.
    on_rank_lost: an active rank's process ended although it was not to leave (rank, sentence).
    """

    def __init__(
        self,
        *,
        config: ElasticConfig,
        channel: WorkerChannel,
        hmm: AsyncHmmClient,
        control: ControlPage,
        placement: Placement,
        send_command: Callable[[bytes], Awaitable[None]],
        send_route: Callable[[Sequence[int]], Awaitable[None]],
        send_recover_route: Callable[[str, Sequence[int]], Awaitable[set[str]]],
        send_again: Callable[[set[str]], Awaitable[int]],
        on_rank_lost: Callable[[int, str], None],
    ) -> None:
        self._config = config
        self._channel = channel
        self._hmm = hmm
        self._control = control
        self._kv = KvPools(config, channel, hmm, resize_s=config.commit_deadline_s)
        self._placement = placement
        self._send_command = send_command
        self._send_route = send_route
        self._send_recover_route = send_recover_route
        self._send_again = send_again
        self._on_rank_lost = on_rank_lost
        self._pids: dict[int, int] = {}
        self._population = to_imm.Population(ranks={}, standbys=[], starting=[])
        self._hellos: dict[int, to_coordinator.Hello] = {}
        self._joining: set[int] = set()
        self._departures: dict[int, Departure] = {}
        self.fences = OutputFences()
        self._resending = asyncio.Lock()
        self._attempt = 0
        self.pauses: dict[int, float] = {}

    # -- what is known ------------------------------------------------------------------------------------------

    def message(self, message: Incoming) -> None:
        """Keep the picture of who is where; called for every message."""
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
            self._kv.learn(message.rank, message.kv)
        elif isinstance(message, to_coordinator.Paused):
            self.pauses[message.rank] = message.pause_ms
        elif isinstance(message, to_coordinator.Broken) and message.culprit in self._pids.keys() - self._joining:
            # Dead, and its exit is on its way; or it stands still, and then it has to go.
            culprit = message.culprit
            asyncio.get_running_loop().call_later(_STALLED_S, self._end_stalled, culprit, self._pids[culprit])

    def _check_loss(self, message: to_coordinator.WorkerExited) -> None:
        expected = message.rank in self._departures or message.rank in self._joining
        if not expected and message.rank in self.membership().ranks:
            self._on_rank_lost(
                message.rank, f"rank {message.rank} (pid {message.pid}) was serving and ended with {message.status}"
            )

    def _end_stalled(self, rank: int, pid: int) -> None:
        if self._pids.get(rank) == pid:
            logger.error("rank %d (pid %d) stands still; its process is ended", rank, pid)
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
            kv=self._control.kv,
            kv_bytes=self._kv.held(),
        )

    # -- KV -----------------------------------------------------------------------------------------------------

    def least_kv_bytes(self) -> int:
        return self._kv.least_bytes()

    async def shrink_kv(self, plan: ScalePlan) -> Mapping[int, int]:
        return await self._kv.shrink_kv(plan, ranks=plan.after.ranks, joining=plan.joining, retiring=plan.retiring)

    async def grow_kv(self) -> None:
        await self._kv.fill(lambda: (self.membership().ranks, self._placement))

    async def grow_idle_kv(self, when: Callable[[], bool]) -> None:
        """Between changes: nobody gives anything up, and nothing is done unless `when` says so."""
        await self._kv.fill(lambda: (self.membership().ranks, self._placement) if when() else None, only_grow=True)

    # -- prepare ------------------------------------------------------------------------------------------------

    async def boot(self, join_spec: to_worker.JoinSpec) -> PullReport:
        started = time.monotonic()
        hello = await self._put_in(join_spec)
        if hello.checkpoint_bytes:
            logger.warning("rank %d read %d bytes of the checkpoint to join", hello.rank, hello.checkpoint_bytes)
        columns = join_spec.placement.count(join_spec.rank)
        return PullReport(columns=columns, bytes=hello.pulled_bytes, seconds=time.monotonic() - started)

    async def _put_in(self, join_spec: to_worker.JoinSpec) -> to_coordinator.Hello:
        """Have a standby take a rank, and wait until it has booted."""
        rank = join_spec.rank
        self._joining.add(rank)
        self._channel.forget(lambda message: getattr(message, "rank", None) == rank)
        self._channel.tell_imm(to_imm.Assign(join_spec=join_spec))
        return await self._channel.wait_for(to_coordinator.Hello, rank=rank)

    async def pull(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> PullReport:
        sources = {move.column: self._config.device_of(move.source) for move in moves}
        await self._channel.tell_worker(rank, to_worker.PullColumns(operation_id=txn, txn=txn, sources=sources))
        pulled = await self._channel.wait_for(to_worker.Pulled, rank=rank, operation_id=txn)
        return PullReport(columns=pulled.columns, bytes=pulled.bytes, seconds=pulled.seconds)

    async def drop(self, rank: int, txn: str, moves: Sequence[ColumnMove]) -> None:
        if rank not in self._pids:
            return  # it died, and its mappings with it
        columns = tuple(move.column for move in moves)
        await self._channel.tell_worker(rank, to_worker.DropColumns(operation_id=f"drop-{txn}", columns=columns))
        await self._channel.wait_for(to_worker.Dropped, rank=rank, operation_id=f"drop-{txn}")

    # -- commit -------------------------------------------------------------------------------------------------

    async def commit(self, plan: ScalePlan, deadline_s: float) -> CommitReport:
        self._attempt += 1
        operation_id = f"{plan.after.epoch}.{self._attempt}"
        command = to_worker.CommitCommand(
            operation_id=operation_id,
            before=plan.before.ranks,
            members=plan.after.ranks,
            epoch=plan.after.epoch,
            attempt=self._attempt,
            placement=plan.placement_after.owners,
            expires=time.monotonic() + deadline_s,
        )
        self.pauses = {}
        for rank in plan.retiring:
            self._departures[rank] = Departure(operation_id=operation_id, survivors=plan.survivors)
        try:
            await self._send_command(to_worker.COMMIT.pack(command))
            reports = await asyncio.gather(
                *(
                    self._channel.wait_for(to_coordinator.Committed, rank=rank, operation_id=operation_id)
                    for rank in command.before
                )
            )
        except BaseException:
            # Whether it has happened is read from the control page by the caller.
            await self._settle(plan, self.membership().epoch == plan.after.epoch)
            raise
        committed = all(report.committed for report in reports)
        await self._settle(plan, committed)
        if not committed:
            reason = next((report.reason for report in reports if report.reason), "the commit barrier decided to abort")
            return CommitReport(committed=False, epoch=plan.before.epoch, reason=reason)
        await self._wait_for_pauses(plan)
        pauses = {report.rank: self.pauses.get(report.rank, report.barrier_ms) for report in reports}
        return CommitReport(committed=True, epoch=plan.after.epoch, pause_ms=pauses)

    async def _settle(self, plan: ScalePlan, committed: bool) -> None:
        if committed:
            self._placement = plan.placement_after
            self._joining -= set(plan.joining)
            # At once, not with the rest of finishing: clients of the moved requests are waiting.
            for rank in plan.retiring:
                departure = self._departures[rank]
                departure.migration = asyncio.get_running_loop().create_task(self._migrate(rank, departure))
        else:
            for rank in plan.retiring:
                self._departures.pop(rank, None)
        for rank in self.membership().ranks:
            if (
                rank not in self._pids
            ):  # a retiring rank that stays after all, or a joining rank, whose end was no surprise until now
                self._on_rank_lost(rank, f"rank {rank} ended during the change and is a member after it")
        await self._send_route((plan.after if committed else plan.before).ranks)

    async def _wait_for_pauses(self, plan: ScalePlan) -> None:
        deadline = time.monotonic() + _PAUSE_REPORT_S
        while time.monotonic() < deadline and not set(plan.survivors) <= set(self.pauses):
            await asyncio.sleep(0.01)

    # -- finish -------------------------------------------------------------------------------------------------

    async def release(self, rank: int, columns: Sequence[int]) -> None:
        if rank in self._pids:
            operation = f"release-{rank}-{time.monotonic_ns()}"
            await self._channel.tell_worker(rank, to_worker.DropColumns(operation_id=operation, columns=tuple(columns)))
            await self._channel.wait_for(to_worker.Dropped, rank=rank, operation_id=operation)
        device = self._config.device_of(rank)
        # A column that another rank of the same device took over stays where it is.
        gone = [c for c in columns if self._config.device_of(self._placement.owners[c]) != device]
        blocks = await self._hmm.lookup(kind="column", device=device, columns=gone) if gone else []
        if blocks:
            await self._hmm.release([block.block_id for block in blocks])

    async def dismiss(self, rank: int) -> int:
        departure = self._departures.get(rank)
        if departure is None or departure.migration is None:
            await self._cancel_join(rank)
            return 0
        moved = await departure.migration
        if rank in self._pids:
            await self._channel.wait_for(to_coordinator.WorkerExited, rank=rank, exits=False)
        del self._departures[rank]
        await self._release_dense(rank)
        await self._kv.drop([rank])
        return moved

    async def _migrate(self, rank: int, departure: Departure) -> int:
        """Let the survivors go on with the retiring rank's requests once its last tokens have been delivered."""
        try:
            left = await self._channel.wait_for(to_coordinator.Retired, rank=rank, operation_id=departure.operation_id)
        except WorkerError as error:
            logger.error("a retiring rank died while handing over; its requests are sent again: %s", error)
            departure.died = True
            # What another retiring rank has on its way is nowhere to be found, and must not be sent again.
            await migrations_done(self._departures.values())
            return await self._resend(f"resend-{departure.operation_id}-{rank}", forget=rank)
        return await migrate(self._channel, self.fences, departure, left)

    # -- another HMM ----------------------------------------------------------------------------------------------

    async def offer_memory(self) -> int:
        """Have every rank offer what it maps to the HMM that answers now. Returns how many blocks it did not have."""
        operation_id = f"offer-{time.monotonic_ns()}"
        ranks = [rank for rank in self.membership().ranks if rank in self._pids]
        for rank in ranks:
            await self._channel.tell_worker(rank, to_worker.OfferMemory(operation_id=operation_id))
        offered = await asyncio.gather(
            *(self._channel.wait_for(to_worker.Offered, rank=rank, operation_id=operation_id) for rank in ranks)
        )
        return sum(message.blocks for message in offered)

    # -- a rank's death -----------------------------------------------------------------------------------------

    async def recover(self, plan: RecoveryPlan, deadline_s: float) -> int:
        """Go on as planned; returns how many of the dead ranks' requests were sent again.

        Raises:
            WorkerError: it did not work out, for example because another rank has died: plan anew.
        """
        self._attempt += 1
        operation_id = f"recover-{plan.membership.epoch}.{self._attempt}"
        await migrations_done(self._departures.values())
        await self._kv.drop(plan.dead)
        first = await self._kv.shrink_kv(plan, ranks=plan.membership.ranks, joining=plan.replaced)
        await asyncio.gather(
            *(self._replace(rank, plan, operation_id, first.get(rank, 0)) for rank in plan.replaced),
            *(self._take_over(rank, plan, operation_id) for rank in plan.survivors if plan.incoming(rank)),
        )
        members = plan.membership.ranks
        command = to_worker.Recover(
            operation_id=operation_id,
            members=members,
            epoch=plan.membership.epoch,
            attempt=self._attempt,
            placement=plan.placement.owners,
            expires=time.monotonic() + deadline_s,
        )
        for rank in plan.survivors:
            await self._channel.tell_worker(rank, command)
        opened = await self._send_recover_route(operation_id, members)
        here = await self._recovered(operation_id, members)
        self._placement = plan.placement
        self._joining -= set(plan.replaced)
        sent = await self._send_again(opened - here)
        await self._release_dead(plan)
        await self.grow_kv()
        return sent

    async def _recovered(self, operation_id: str, members: Sequence[int]) -> set[str]:
        reports = await asyncio.gather(
            *(self._channel.wait_for(to_worker.Recovered, rank=rank, operation_id=operation_id) for rank in members)
        )
        absent = [report.rank for report in reports if not report.committed]
        if absent:
            raise WorkerError(f"ranks {absent} did not pass the commit barrier", operation=operation_id)
        # What has ended on a member is on none of them, and open until its last output has passed.
        await self.fences.wait(operation_id, members)
        return {rid for report in reports for rid in report.rids}

    async def _replace(self, rank: int, plan: RecoveryPlan, operation_id: str, kv_chunks: int) -> None:
        """A standby takes the dead rank's place; its weights are still on its device."""
        join_spec = to_worker.JoinSpec(
            rank=rank,
            members=plan.membership.ranks,
            epoch=plan.membership.epoch,
            joining_rank=True,
            placement=plan.placement.owners,
            attempt=self._attempt,
            kv_chunks=kv_chunks,
            operation_id=operation_id,
        )
        await self._put_in(join_spec)

    async def _take_over(self, rank: int, plan: RecoveryPlan, operation_id: str) -> None:
        sources = {move.column: self._config.device_of(move.source) for move in plan.incoming(rank)}
        await self._channel.tell_worker(rank, to_worker.PullColumns(operation_id=operation_id, txn="", sources=sources))
        await self._channel.wait_for(to_worker.Pulled, rank=rank, operation_id=operation_id)

    async def _resend(self, operation_id: str, *, forget: int) -> int:
        """Send again what is open and on no rank, with the membership as it is."""
        async with self._resending:  # a rank counts for one operation at a time
            members = self.membership().ranks
            for member in members:
                await self._channel.tell_worker(
                    member, to_worker.CountRequests(operation_id=operation_id, forget=forget)
                )
            opened = await self._send_recover_route(operation_id, members)
            return await self._send_again(opened - await self._recovered(operation_id, members))

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
        """The last rank of a device takes the device's copy of the dense weights along."""
        device = self._config.device_of(rank)
        if any(self._config.device_of(other) == device for other in self.membership().ranks):
            return
        blocks = await self._hmm.lookup(kind="dense", device=device)
        if blocks:
            await self._hmm.release([block.block_id for block in blocks])
