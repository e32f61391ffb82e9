"""Accepts targets, keeps the records of all operations, and runs the engine."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator import steps as s
from elasticmoe_sglang.coordinator.driver import Driver
from elasticmoe_sglang.coordinator.engine import Engine
from elasticmoe_sglang.coordinator.observer import Observer, Recovery
from elasticmoe_sglang.coordinator.ports import MemoryPort, WorkersPort
from elasticmoe_sglang.coordinator.proposal import Deadlines
from elasticmoe_sglang.coordinator.routing import observe
from elasticmoe_sglang.coordinator.status import (
    CommitReport,
    DeviceMemory,
    MemoryStatus,
    Moved,
    Operation,
    Phase,
    PullReport,
    RankInfo,
    RunningOperation,
    Status,
    describe_target,
)
from elasticmoe_sglang.errors import (
    ElasticMoEError,
    HmmUnavailable,
    OperationIdTaken,
    OperationInProgress,
    StaleRequest,
    UserInputError,
    WorkerError,
)
from elasticmoe_sglang.planner import (
    Cause,
    DeviceRoom,
    ModelNeeds,
    Rebalance,
    Target,
    TransitionPlan,
    View,
    check_budgets,
    plan_target,
)

logger = logging.getLogger(__name__)

HISTORY = 256
_MEMORY_STATUS_S = 5.0
_OPERATION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Coordinator:
    """Runs in one event loop, where its coroutines must be called; the other methods may be called from any thread.

    Args:
        view: that of the server's start. pids: of the workers that serve it.
        on_end: called with a sentence when serving cannot go on.
        observer: is told of what ends, and of losses.

    Attributes:
        await_memory: waits until the HMM's ledger is whole. tidy: releases memory that no rank uses. Both are set by
            who replaces an HMM that has ended.

    Raises:
        WorkerError: an active rank has no worker.
    """

    def __init__(
        self,
        *,
        config: ElasticConfig,
        view: View,
        pids: Mapping[int, int],
        memory: MemoryPort,
        workers: WorkersPort,
        on_end: Callable[[str], None] = logger.critical,
        observer: Observer | None = None,
    ) -> None:
        gone = [rank for rank in view.ranks if rank not in pids]
        if gone:
            raise WorkerError(f"the workers of ranks {gone} ended while the server started", hint="Their log says why")
        self._config = config
        self._memory = memory
        self._workers = workers
        self._operations: dict[str, RunningOperation] = {}
        self._submitting = asyncio.Lock()
        self._closed = False
        self._observer = observer or Observer()
        self._memory_held: HmmUnavailable | None = None
        self._routed: Mapping[int, int] = {}
        self.await_memory: Callable[[], Awaitable[None]] = _at_once
        self.tidy: Callable[[], Awaitable[object]] = _at_once
        deadlines = Deadlines(
            prepare=config.prepare_deadline_s,
            commit=config.commit_deadline_s,
            finish=config.finish_deadline_s,
            recover=config.prepare_deadline_s,
            collective=config.collective_deadline_s,
        )
        self._engine = Engine(view, dict(pids), deadlines, restore=config.restore, replica_size=config.attention_tp)
        self._driver = Driver(
            self._engine,
            memory=memory,
            workers=workers,
            check_room=self._check_room,
            await_memory=lambda: self.await_memory(),
            tidy=lambda: self.tidy(),
            on_progress=self._progress,
            on_result=self._result,
            on_end=on_end,
        )

    def post(self, event: s.Event) -> None:
        """Tell the engine what has happened."""
        before = self._engine.lost()
        self._driver.post(event)
        for rank in self._engine.lost():
            if rank not in before:
                self._observer.on_rank_lost(rank)

    @property
    def view(self) -> View:
        """The view committed last."""
        return self._engine.view

    @property
    def running(self) -> Operation | None:
        """The operation that has not ended yet; a target rather than what runs before it."""
        open_ = [operation for operation in self._newest_first() if not operation.phase.ended]
        targets = [operation for operation in open_ if operation.target is not None]
        return (targets or open_)[0].view() if open_ else None

    @property
    def redundant_experts(self) -> int:
        """The most copies of expert columns there may be."""
        return self._config.redundant_experts

    @property
    def idle(self) -> bool:
        """No change runs, no rank is being recovered, and the HMM is available."""
        return self._engine.idle and not self._closed

    @property
    def at_rest(self) -> bool:
        """As `idle`, no lost rank waits to be brought back, and a standby worker is ready."""
        return self.idle and self._engine.at_rest

    @property
    def last(self) -> Operation | None:
        """The latest operation that has ended."""
        ended = (operation for operation in self._newest_first() if operation.phase.ended)
        latest = next(ended, None)
        return latest.view() if latest is not None else None

    async def submit(
        self, target: Target, operation_id: str | None = None, *, expected_epoch: int | None = None
    ) -> Operation:
        """Start a change to `target`, or return the operation that already has this id.

        Returns once the change is planned and fits the budgets; if the target is met already, the operation has ended.
        While survivors recover from a loss the change waits for them; a restore that is preparing makes way for it.

        Args:
            expected_epoch: of the view that the change is planned from; any if None. An operation that has this id
                already is found whatever its epoch: a request that is repeated may have raised it itself.

        Raises:
            PlanError, BudgetExceeded, UserInputError: the target is impossible.
            StaleRequest: the view has another epoch.
            OperationIdTaken: the id belongs to another target.
            OperationInProgress: a change to another target is running, or the server is shutting down.
            HmmUnavailable: the HMM does not answer, so no change is possible; serving is not affected.
        """
        check_operation_id(operation_id)
        # Held while waiting for the HMM, so that the second of two equal requests finds the operation of the first.
        async with self._submitting:
            known = self._operations.get(operation_id) if operation_id is not None else None
            if known is not None:
                return _same_target(known, target).view()
            return await self._start(target, operation_id or uuid.uuid4().hex, expected_epoch)

    async def _start(self, target: Target, operation_id: str, expected_epoch: int | None) -> Operation:
        started = time.monotonic()
        running = self.running
        if running is not None and running.cause is Cause.TARGET:
            raise OperationInProgress(
                f"a change to EP size {running.new_ep_size} is {running.phase.value}",
                operation=running.operation_id,
                hint="Wait until it has ended; one change runs at a time",
            )
        if self._closed:
            raise OperationInProgress("the server is shutting down")
        self._check_epoch(expected_epoch)
        plan = plan_target(self.view, target, replica_size=self._config.attention_tp)
        if not plan.is_noop:
            if self._memory_held is not None:
                raise HmmUnavailable(self._memory_held.what, hint=self._memory_held.hint)
            await self._check_room(plan)
            self._check_epoch(expected_epoch)  # a rank may have been lost meanwhile
        operation = RunningOperation(operation_id, target, plan, started)
        self._remember(operation)
        if not plan.is_noop:
            logger.info(
                "operation %s: EP size %d -> %d, %d columns move",
                operation_id,
                len(plan.before.ranks),
                len(plan.after.ranks),
                len(plan.moves),
            )
        self.post(s.Wanted(operation_id=operation_id, target=target, plan=plan))
        return operation.view()

    def _check_epoch(self, expected: int | None) -> None:
        if expected not in (None, self.view.epoch):
            raise StaleRequest(
                f"the request is for the topology generation {expected}, the current one is {self.view.epoch}",
                hint="The membership has changed: read the status before the next request",
            )

    async def observe_routing(self, seconds: float) -> tuple[int, ...]:
        """Tokens routed to each expert column in so many seconds from now; see `routing.observe`."""
        seen = await observe(self._workers, lambda: self.view, seconds)
        self._routed = seen.by_rank
        return seen.by_column

    def _progress(self, effect: s.Opened | s.Advanced) -> None:
        operation = self._operations.get(effect.operation_id)
        if isinstance(effect, s.Opened):
            if operation is None:
                self._remember(RunningOperation(effect.operation_id, None, effect.plan, time.monotonic()))
            elif operation.plan != effect.plan or operation.phase is not Phase.PLANNED:
                operation.begin(effect.plan)
            return
        assert operation is not None, f"{effect.operation_id} was never opened"
        operation.advance(effect.phase, effect.error, serving_epoch=self.view.epoch)
        if effect.phase.ended:
            self._report_end(operation.view())

    def _report_end(self, ended: Operation) -> None:
        level = logging.INFO if ended.phase is Phase.DONE else logging.ERROR
        if ended.cause is not Cause.LOSS:
            self._observer.on_operation_ended(ended)
        elif ended.serving_epoch == ended.epoch:
            seconds = (ended.timings.total_ms or 0.0) / 1e3
            self._observer.on_recovered(
                Recovery(
                    dead=ended.lost,
                    ranks=ended.ranks_after,
                    epoch=ended.epoch,
                    seconds=seconds,
                    requests_resent=ended.resent_requests,
                )
            )
            logger.warning(
                "ranks %s were lost; epoch %d serves with ranks %s after %.2f s (%d columns moved, %d requests sent "
                "again)",
                ended.lost,
                ended.epoch,
                ended.ranks_after,
                seconds,
                ended.columns_moved,
                ended.resent_requests,
            )
        logger.log(
            level,
            "operation %s: %s after %s ms: %s",
            ended.operation_id,
            ended.phase.value,
            ended.timings.total_ms,
            ended.error,
        )

    def _result(self, operation_id: str, step: s.Step, result: object) -> None:
        operation = self._operations.get(operation_id)
        if operation is None:
            return
        match step, result:
            case (s.Boot(join_spec=spec), PullReport()) if operation.plan.incoming(spec.rank):
                operation.add_pull(result)
            case s.Pull(), PullReport():
                operation.add_pull(result)
            case s.Commit(), CommitReport():
                operation.add_pauses(result.pause_ms)
            case s.Pauses(), Mapping():
                operation.add_pauses(result)
            case s.Migrate(), Moved():
                operation.add_moved(result)
            case s.SpreadWaiting(), int():
                operation.add_spread(result)
            case s.Resend(), int():
                operation.add_resent(result)
            case s.ReadMemory(after=False), MemoryStatus():
                operation.memory_before(result)
            case s.ReadMemory(), MemoryStatus():
                operation.memory_after(result)
            case ((s.CommitMemory() | s.RollBackMemory()), list() | tuple()):
                operation.memory_peak(result)

    async def hold_memory(self, reason: HmmUnavailable) -> None:
        """Refuse targets with an error like `reason` until `release_memory`. Returns when no change runs that is not a
        recovery; a recovery waits for the memory."""
        self._memory_held = reason
        self.post(s.MemoryHeld(reason=reason))
        await self._quiet()

    def release_memory(self) -> None:
        """The ledger is whole again."""
        self._memory_held = None
        self.post(s.MemoryHeld(reason=None))

    async def _quiet(self) -> None:
        """Wait until no target and no restore runs. One that waits for a recovery does not run."""
        while (plan := self._engine.running) is not None and plan.cause is not Cause.LOSS:
            await self._operations[self._engine.operation_id()].ended.wait()

    def _remember(self, operation: RunningOperation) -> None:
        self._operations[operation.operation_id] = operation
        # Only ended operations are dropped: few run, and they are the newest.
        while len(self._operations) > HISTORY:
            del self._operations[next(iter(self._operations))]

    async def _check_room(self, plan: TransitionPlan) -> None:
        memory = await self._memory_status()
        if not memory.available:
            raise HmmUnavailable(
                memory.error or "the HMM does not answer", hint="Serving goes on; start an HMM and try again"
            )
        if memory.column_bytes is None or memory.dense_bytes is None:
            raise HmmUnavailable("the HMM holds no model yet", hint="Try again when the server has loaded it")
        least = self._workers.least_kv_bytes()
        model = ModelNeeds(
            column_bytes=memory.column_bytes,
            dense_bytes=memory.dense_bytes,
            rank_bytes=least,
            replica_size=self._config.attention_tp,
        )
        check_budgets(plan, model, [self._room(device, plan, least) for device in memory.devices])

    def _room(self, device: DeviceMemory, plan: TransitionPlan, least: int) -> DeviceRoom:
        ranks = tuple(rank.rank for rank in self._workers.ranks() if rank.device == device.device)
        kv = device.by_kind.get("kv", 0)
        serving = sum(rank in plan.before.ranks for rank in ranks)
        return DeviceRoom(
            device=device.device,
            ranks=ranks,
            budget=device.budget,
            # KV shrinks where columns need memory, down to the least that each rank needs.
            used=device.used - max(0, kv - serving * least),
            holds_dense=device.by_kind.get("dense", 0) > 0,
        )

    async def _memory_status(self) -> MemoryStatus:
        """The HMM's status, or why there is none: the rest of the server's status does not depend on it."""
        held = self._memory_held
        if held is not None:
            error = f"{held.what}. {held.hint}"
            return MemoryStatus(available=False, endpoint=self._config.hmm_endpoint, error=error)
        try:
            return await asyncio.wait_for(self._memory.status(), _MEMORY_STATUS_S)
        except asyncio.TimeoutError:
            why = f"the HMM did not answer within {_MEMORY_STATUS_S:g} s"
        except (ElasticMoEError, OSError) as error:
            why = str(error)
        return MemoryStatus(available=False, endpoint=self._config.hmm_endpoint, error=why)

    def ranks(self) -> list[RankInfo]:
        """All ranks, ascending. May be called from any thread."""
        return list(self._workers.ranks())

    def get(self, operation_id: str) -> Operation | None:
        """One of the latest HISTORY operations, None if there is none with this id."""
        operation = self._operations.get(operation_id)
        return operation.view() if operation is not None else None

    def rebalance_of(self, operation_id: str) -> tuple[Rebalance, TransitionPlan]:
        """Target and plan of a rebalance among the latest operations."""
        operation = self._operations[operation_id]
        assert isinstance(operation.target, Rebalance)
        return operation.target, operation.plan

    def operations(self) -> list[Operation]:
        """The latest HISTORY operations, newest first."""
        return [operation.view() for operation in self._newest_first()]

    def _newest_first(self) -> list[RunningOperation]:
        # Copying is atomic in CPython, so another thread may call this while an operation is added.
        return list(self._operations.values())[::-1]

    async def wait(self, operation_id: str) -> Operation:
        """Wait until the operation has ended. Raises KeyError for an unknown operation."""
        operation = self._operations[operation_id]
        await operation.ended.wait()
        return operation.view()

    async def status(self) -> Status:
        """The server's current state; waits at most _MEMORY_STATUS_S seconds for the HMM."""
        memory = await self._memory_status()
        view = self.view
        return Status(
            ep_size=len(view.ranks),
            max_ep_size=view.membership.capacity,
            attention_tp=self._config.attention_tp,
            epoch=view.epoch,
            membership=list(view.ranks),
            target_ranks=list(self._engine.target_ranks),
            ranks=list(self._workers.ranks()),
            placement=list(view.owners),
            copies={column: list(ranks) for column, ranks in view.placement.copied().items()},
            redundant_experts=self.redundant_experts,
            routed=dict(self._routed),
            memory=memory,
            running=self.running,
            last=self.last,
        )

    async def close(self) -> None:
        """Refuse targets from now on. A change that is preparing is rolled back; a later phase is waited for."""
        self._closed = True
        self.post(s.Closing())
        await self._quiet()


def check_operation_id(operation_id: str | None) -> None:
    """Raises UserInputError for what cannot name an operation."""
    if operation_id is not None and not _OPERATION_ID.fullmatch(operation_id):
        raise UserInputError(
            "operation_id is not a valid name",
            hint="Use 1 to 128 letters, digits, '.', '_', ':' or '-'",
        )


async def _at_once() -> None:
    return


def _same_target(known: RunningOperation, target: Target) -> RunningOperation:
    both = isinstance(known.target, Rebalance) and isinstance(target, Rebalance)  # whatever was observed
    if known.target != target and not both:
        used = describe_target(known.target) if known.target is not None else known.plan.cause.value
        raise OperationIdTaken(
            f"operation_id was used for another target, {used}",
            operation=known.operation_id,
            hint="Use a new operation_id for a new target",
        )
    return known
