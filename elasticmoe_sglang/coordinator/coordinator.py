"""Accepts targets, runs one change at a time and remembers the latest ones."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.change import Change
from elasticmoe_sglang.coordinator.ports import MemoryPort, WorkersPort
from elasticmoe_sglang.coordinator.status import (
    DeviceMemory,
    MemoryStatus,
    Operation,
    Phase,
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
    UserInputError,
)
from elasticmoe_sglang.planner import (
    DeviceRoom,
    ModelNeeds,
    Placement,
    ScalePlan,
    Target,
    check_budgets,
    plan_scale,
)

logger = logging.getLogger(__name__)

HISTORY = 256
_MEMORY_STATUS_S = 5.0
_OPERATION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Coordinator:
    """Runs in one event loop, where its coroutines must be called; the other methods may be called from any thread.

    Args:
        membership, placement: those of the server's start.
    """

    def __init__(
        self,
        *,
        config: ElasticConfig,
        membership: Membership,
        placement: Placement,
        memory: MemoryPort,
        workers: WorkersPort,
    ) -> None:
        self._config = config
        self._membership = membership
        self._placement = placement
        self._memory = memory
        self._workers = workers
        self._operations: dict[str, RunningOperation] = {}
        self._latest: RunningOperation | None = None
        self._task: asyncio.Task[None] | None = None
        self._change: Change | None = None
        self._submitting = asyncio.Lock()
        self._closed = False
        self._holds: list[ElasticMoEError] = []

    @property
    def membership(self) -> Membership:
        return self._membership

    @property
    def placement(self) -> Placement:
        return self._placement

    @property
    def running(self) -> Operation | None:
        """The operation that has not ended yet."""
        return self._latest.view() if self._latest is not None and not self._latest.phase.ended else None

    @property
    def idle(self) -> bool:
        """No change runs, no rank is being recovered, and the HMM is available."""
        return self.running is None and not self._holds and not self._closed

    @property
    def last(self) -> Operation | None:
        """The latest operation that has ended."""
        ended = (operation for operation in self._newest_first() if operation.phase.ended)
        latest = next(ended, None)
        return latest.view() if latest is not None else None

    async def submit(self, target: Target, operation_id: str | None = None) -> Operation:
        """Start a change to `target`, or return the operation that already has this id.

        Returns once the change is planned and fits the budgets; if the target is met already, the operation has ended.

        Raises:
            PlanError, BudgetExceeded, UserInputError: the target is impossible.
            OperationIdTaken: the id belongs to another target.
            OperationInProgress: a change is running.
            HmmUnavailable: the HMM does not answer, so no change is possible; serving is not affected.
        """
        if operation_id is not None and not _OPERATION_ID.fullmatch(operation_id):
            raise UserInputError(
                "operation_id is not a valid name",
                hint="Use 1 to 128 letters, digits, '.', '_', ':' or '-'",
            )
        # Held while waiting for the HMM, so that the second of two equal requests finds the operation of the first.
        async with self._submitting:
            known = self._operations.get(operation_id) if operation_id is not None else None
            if known is not None:
                return _same_target(known, target).view()
            return await self._start(target, operation_id or uuid.uuid4().hex)

    async def _start(self, target: Target, operation_id: str) -> Operation:
        started = time.monotonic()
        running = self.running
        if running is not None:
            raise OperationInProgress(
                f"a change to EP size {running.new_ep_size} is {running.phase.value}",
                operation=running.operation_id,
                hint="Wait until it has ended; one change runs at a time",
            )
        if self._closed:
            raise OperationInProgress("the server is shutting down")
        held = self._memory_hold() or next(iter(self._holds), None)
        if held is not None:
            raise type(held)(held.what, hint=held.hint)
        plan = plan_scale(self._membership, self._placement, target)
        if not plan.is_noop:
            await self._check_room(plan)
        operation = RunningOperation(operation_id, target, plan, started)
        self._remember(operation)
        if plan.is_noop:
            operation.end(Phase.DONE)
        else:
            logger.info("operation %s: EP size %d -> %d", operation_id, len(plan.before.ranks), len(plan.after.ranks))
            change = Change(
                operation,
                memory=self._memory,
                workers=self._workers,
                config=self._config,
                on_committed=self.adopt,
            )
            self._change = change
            self._task = asyncio.get_running_loop().create_task(self._run(change, operation))
        return operation.view()

    async def _run(self, change: Change, operation: RunningOperation) -> None:
        try:
            await change.run()
        finally:
            if not operation.phase.ended:
                operation.end(Phase.FAILED, "the coordinator failed during the change; see its log")
            ended = operation.view()
            log = logger.info if ended.phase is Phase.DONE else logger.error
            log(
                "operation %s: %s after %s ms: %s",
                ended.operation_id,
                ended.phase.value,
                ended.timings.total_ms,
                ended.error,
            )

    def adopt(self, membership: Membership, placement: Placement) -> None:
        """Set the current membership and placement."""
        self._membership = membership
        self._placement = placement

    async def hold(self, reason: ElasticMoEError, *, interrupt: str | None = None) -> None:
        """Refuse targets with an error like `reason` until `resume`, and wait until the running change has ended.

        Args:
            interrupt: if given, a change that is still preparing is rolled back at once with this as its error.
        """
        self._holds.append(reason)
        await self._end_change(interrupt)

    async def _end_change(self, interrupt: str | None) -> None:
        if self._task is None or self._task.done() or self._latest is None or self._change is None:
            return
        if interrupt is not None:
            if self._latest.phase is Phase.PLANNED:
                await asyncio.sleep(0)  # let it start preparing
            self._change.interrupt(interrupt)
        await asyncio.wait({self._task})

    def resume(self, reason: ElasticMoEError) -> None:
        """End the hold that was given this reason."""
        self._holds.remove(reason)

    def _memory_hold(self) -> HmmUnavailable | None:
        return next((hold for hold in self._holds if isinstance(hold, HmmUnavailable)), None)

    def _remember(self, operation: RunningOperation) -> None:
        self._latest = operation
        self._operations[operation.operation_id] = operation
        # Only ended operations are dropped: at most one runs, and it is the newest.
        while len(self._operations) > HISTORY:
            del self._operations[next(iter(self._operations))]

    async def _check_room(self, plan: ScalePlan) -> None:
        memory = await self._memory_status()
        if not memory.available:
            raise HmmUnavailable(
                memory.error or "the HMM does not answer", hint="Serving goes on; start an HMM and try again"
            )
        if memory.column_bytes is None or memory.dense_bytes is None:
            raise HmmUnavailable("the HMM holds no model yet", hint="Try again when the server has loaded it")
        least = self._workers.least_kv_bytes()
        model = ModelNeeds(column_bytes=memory.column_bytes, dense_bytes=memory.dense_bytes, rank_bytes=least)
        check_budgets(plan, model, [self._room(device, plan, least) for device in memory.devices])

    def _room(self, device: DeviceMemory, plan: ScalePlan, least: int) -> DeviceRoom:
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
        held = self._memory_hold()
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
        return Status(
            ep_size=len(self._membership.ranks),
            max_ep_size=self._membership.capacity,
            epoch=self._membership.epoch,
            membership=list(self._membership.ranks),
            ranks=list(self._workers.ranks()),
            placement=list(self._placement.owners),
            memory=memory,
            running=self.running,
            last=self.last,
        )

    async def close(self) -> None:
        """Refuse targets from now on. A change that is preparing is rolled back; a later phase is waited for."""
        self._closed = True
        await self._end_change("the server is shutting down")


def _same_target(known: RunningOperation, target: Target) -> RunningOperation:
    if known.target != target:
        raise OperationIdTaken(
            f"operation_id was used for another target, {describe_target(known.target)}",
            operation=known.operation_id,
            hint="Use a new operation_id for a new target",
        )
    return known
