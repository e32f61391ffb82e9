"""One run: a method, a workload and a schedule produce a log."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.scaling.clock import Clock
from benchmarks.scaling.methods import Method, warm_up
from benchmarks.scaling.records import ChangeRecord, MemorySample, RequestRecord, RunLog, Token
from benchmarks.scaling.sampling import sample_memory
from benchmarks.scaling.schedule import Schedule
from benchmarks.scaling.workload import Arrival, Workload
from benchmarks.streams import Ask, StreamRecord

_DRAIN_S = 120.0


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Attributes:
    duration_s: the load lasts at least this long, and `settle_s` beyond the end of the last change.
    sample_s: time between two measurements of memory; None: none are made.
    """

    workload: Workload
    schedule: Schedule
    duration_s: float
    settle_s: float
    sample_s: float | None = 1.0


class _Run:
    def __init__(self, method: Method, plan: RunPlan, say: Callable[[str], None]) -> None:
        self.method = method
        self.plan = plan
        self.say = say
        self.clock = Clock()
        self.requests: list[RequestRecord] = []
        self.changes: list[ChangeRecord] = []
        self.memory: list[MemorySample] = []
        self._settled = asyncio.Event()

    async def load(self) -> list[asyncio.Task[None]]:
        """Send every request when it is due, whether or not earlier ones have ended (an open loop)."""
        tasks = []
        for arrival in self.plan.workload.arrivals():
            if await self._settled_before(arrival.due_at):
                break
            tasks.append(asyncio.create_task(self.ask(arrival)))
        await self._settled.wait()
        return tasks

    async def _settled_before(self, moment: float) -> bool:
        """Wait until `moment`, or until the load is to end: then True."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._settled.wait(), max(0.0, moment - self.clock.now()))
        return self._settled.is_set()

    async def ask(self, arrival: Arrival) -> None:
        ask = Ask(key=str(arrival.request_id), prompt=arrival.prompt, tokens=arrival.output_tokens)
        record = StreamRecord(lane=0, ask=ask, sent_at=time.monotonic())
        request = RequestRecord(
            request_id=arrival.request_id,
            due_at=arrival.due_at,
            sent_at=self.clock.of(record.sent_at),
            prompt_tokens=arrival.prompt_words,
            wanted=arrival.output_tokens,
            generation=-1,
            ended_at=0.0,
        )
        self.requests.append(request)
        try:
            request.generation = await self.method.ask(record)
        finally:
            arrived = enumerate(zip(record.arrivals, record.token_ids, strict=True))
            request.tokens = [Token(at=self.clock.of(at), position=i, id=token) for i, (at, token) in arrived]
            request.ended_at = self.clock.of(record.ended_at or time.monotonic())
            request.error = record.failure

    async def change(self) -> None:
        planned = self.plan.schedule.changes if self.method.name != "static" else ()
        for change in planned:
            await self.clock.sleep_until(change.at)
            self.say(f"{self.method.name}: {self.method.size} -> {change.size}")
            record = await self.method.change(change.size)
            self.changes.append(record)
            self.say(
                f"{self.method.name}: {record.error or 'done'} after {record.ended_at - record.requested_at:.2f} s"
            )
            if record.error is not None:
                break
        last = self.changes[-1].ended_at if self.changes else 0.0
        await self.clock.sleep_until(max(last + self.plan.settle_s, self.plan.duration_s))
        self._settled.set()


async def run(
    method: Method,
    plan: RunPlan,
    *,
    about: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> RunLog:
    """Start the method's servers, put it under load, change its size as planned, stop everything.

    Raises:
        ServerFailed: the first server did not start. MethodFailed: it does not answer as it should.
    """
    say(f"{method.name}: starting")
    sampler: asyncio.Task[None] | None = None
    try:
        await method.start(plan.schedule.start)
        await warm_up(method, method.size)
        running = _Run(method, plan, say)
        method.begin(running.clock)
        if plan.sample_s is not None:
            sampler = asyncio.create_task(
                sample_memory(method.pids, running.clock, plan.sample_s, running.memory), name="memory"
            )
        changing = asyncio.create_task(running.change())
        tasks = await running.load()
        load_ended_at = running.clock.now()
        await changing
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_DRAIN_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return RunLog(
            method=method.name,
            load_ended_at=load_ended_at,
            ended_at=running.clock.now(),
            requests=running.requests,
            changes=running.changes,
            memory=running.memory,
            holdings=method.holdings,
            device_memory=await method.device_memory(),
            about=about or {},
        )
    finally:
        if sampler is not None:
            sampler.cancel()
            await asyncio.gather(sampler, return_exceptions=True)
        await method.stop()
