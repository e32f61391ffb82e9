"""Carries the engine's effects out: makes the calls of its steps, tells it their results and the time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from elasticmoe_sglang.coordinator import steps as s
from elasticmoe_sglang.coordinator.engine import Engine
from elasticmoe_sglang.coordinator.ports import MemoryPort, WorkersPort
from elasticmoe_sglang.coordinator.program import text_of
from elasticmoe_sglang.planner import TransitionPlan

logger = logging.getLogger(__name__)


class Driver:
    """Runs an engine in the current event loop.

    Args:
        check_room: raises BudgetExceeded when a plan does not fit the devices.
        await_memory: returns once the HMM's ledger is whole.
        tidy: releases memory that no rank uses.
        on_progress: called for `Opened` and `Advanced`.
        on_result: called with a step's result and the operation it belongs to.
        on_end: called with a sentence when serving cannot go on.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        memory: MemoryPort,
        workers: WorkersPort,
        check_room: Callable[[TransitionPlan], Awaitable[None]],
        await_memory: Callable[[], Awaitable[None]],
        tidy: Callable[[], Awaitable[object]],
        on_progress: Callable[[s.Opened | s.Advanced], None],
        on_result: Callable[[str, s.Step, object], None],
        on_end: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self._memory = memory
        self._workers = workers
        self._check_room = check_room
        self._await_memory = await_memory
        self._tidy = tidy
        self._on_progress = on_progress
        self._on_result = on_result
        self._on_end = on_end
        self._tasks: dict[int, asyncio.Task[object]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._failed = False

    def post(self, event: s.Event) -> None:
        """Give the engine an event, in the event loop's thread."""
        if self._failed:
            return
        try:
            for effect in self.engine.handle(event, asyncio.get_running_loop().time()):
                self._carry_out(effect)
        except Exception as error:
            # A fault of this program: the engine's state cannot be trusted, and ranks may wait for it.
            self._failed = True
            logger.exception("the engine failed on %s", event)
            self._on_end(f"the engine failed: {text_of(error)}")

    def _carry_out(self, effect: s.Effect) -> None:
        match effect:
            case s.Start():
                task = asyncio.get_running_loop().create_task(self._run(effect.step))
                self._tasks[effect.number] = task
                task.add_done_callback(partial(self._ended, effect))
            case s.Cancel(number=number):
                self._tasks[number].cancel()
            case s.Opened() | s.Advanced():
                self._on_progress(effect)
            case s.EndServer(reason=reason):
                self._on_end(reason)
            case s.WakeAt(time=at):
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
                if at is not None:
                    self._timer = asyncio.get_running_loop().call_at(at, self.post, s.Tick())

    async def _run(self, step: s.Step) -> object:
        return await self._call(step)

    def _ended(self, start: s.Start, task: asyncio.Task[object]) -> None:
        # Not at the end of the coroutine: a task may be cancelled before it has begun.
        del self._tasks[start.number]
        if task.cancelled():
            self.post(s.StepEnded(number=start.number, cancelled=True))
            return
        error = task.exception()
        if error is None:
            self._on_result(start.operation_id, start.step, task.result())
            self.post(s.StepEnded(number=start.number, result=task.result()))
        elif isinstance(error, Exception):
            logger.debug("step %s failed", start.step, exc_info=error)
            self.post(s.StepEnded(number=start.number, error=error))
        else:
            raise error

    def _call(self, step: s.Step) -> Awaitable[object]:
        match step:
            case s.AwaitMemory():
                return self._await_memory()
            case s.CheckRoom(plan=plan):
                return self._check_room(plan)
            case s.Tidy():
                return self._tidy()
            case s.ReadMemory() | s.Begin() | s.CommitMemory() | s.RollBackMemory():
                return self._call_memory(step)
            case _:
                return self._call_workers(step)

    def _call_memory(self, step: s.ReadMemory | s.Begin | s.CommitMemory | s.RollBackMemory) -> Awaitable[object]:
        match step:
            case s.ReadMemory():
                return self._memory.status()
            case s.Begin(operation_id=operation_id):
                return self._memory.begin(operation_id)
            case s.CommitMemory(txn=txn):
                return self._memory.commit(txn)
            case s.RollBackMemory(txn=txn):
                return self._memory.rollback(txn)

    def _call_workers(self, step: s.Step) -> Awaitable[object]:
        workers = self._workers
        match step:
            case s.DropKv(ranks=ranks):
                return workers.drop_kv(ranks)
            case s.ShrinkKv(plan=plan):
                return workers.shrink_kv(plan)
            case s.GrowKv():
                return workers.grow_kv()
            case s.Boot(join_spec=join_spec):
                return workers.boot(join_spec)
            case s.Pull(rank=rank, txn=txn, moves=moves):
                return workers.pull(rank, txn, moves)
            case s.Drop(rank=rank, txn=txn, moves=moves):
                return workers.drop(rank, txn, moves)
            case s.Commit(plan=plan, attempt=attempt, expires=expires):
                return workers.commit_ranks(plan, attempt, expires)
            case s.Withdraw(plan=plan, attempt=attempt):
                return workers.withdraw(plan, attempt)
            case s.Pauses(ranks=ranks):
                return workers.pauses(ranks)
            case s.Route(ranks=ranks):
                return workers.route(ranks)
            case s.Migrate(rank=rank, operation_id=operation_id):
                return workers.migrate(rank, operation_id)
            case s.SpreadWaiting(ranks=ranks, joining=joining):
                return workers.spread_waiting(ranks, joining)
            case s.Resend(operation_id=operation_id, forget=forget):
                return workers.resend(operation_id, forget)
            case s.Dismiss(rank=rank):
                return workers.dismiss(rank)
            case s.Release(rank=rank, columns=columns):
                return workers.release(rank, columns)
            case s.Kill(rank=rank, pid=pid, stalled=stalled):
                return workers.kill(rank, pid, stalled=stalled)
        raise AssertionError(f"no call for {step}")
