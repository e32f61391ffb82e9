"""Carries out one arm of an experiment: starts the servers, and goes through its runs in a shuffled order."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.scaling.clock import Clock
from benchmarks.scaling.experiments import Arm, Experiment, Run
from benchmarks.scaling.groups import CpuMeter, Group
from benchmarks.scaling.methods import Elastic, Method, MethodFailed, warm_up
from benchmarks.scaling.records import ChangeRecord, Load, MemorySample, RequestRecord, RunLog
from benchmarks.scaling.workload import Arrival, Lengths, Workload
from benchmarks.streams import Ask, StreamRecord

_DRAIN_S = 120.0
_AFTER_FAILURE_S = 0.5
_NOTHING_S = 1.0
"""How long a moment without a change lasts."""
_ROUNDS = 3
"""Requests of each lane that a closed loop without a change waits for, after its first ones: at the start all prompts
are prefilled at once, which is no part of a capacity."""
_LONGEST_S = 180.0
_LOOK_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run, ready to be carried out."""

    run: Run
    workload: Workload
    load: Load
    seconds: float


class Recorder:
    """Sends a plan's requests to a method, changes its size meanwhile, and keeps what came of it."""

    def __init__(self, method: Method, plan: Plan, say: Callable[[str], None]) -> None:
        self.method = method
        self.plan = plan
        self.say = say
        self.clock = Clock()
        self.requests: list[RequestRecord] = []
        self.changes: list[ChangeRecord] = []
        self.memory: list[MemorySample] = []
        self._over = asyncio.Event()

    async def record(self, group: Group | None) -> dict[str, Any]:
        """The fields of a RunLog that come of the run itself."""
        await self.method.begin(self.clock)
        meter = CpuMeter(group) if group is not None else None
        sampler = asyncio.create_task(group.sample(self.clock, self.memory)) if group is not None else None
        try:
            changing = asyncio.create_task(self._change())
            tasks: Sequence[asyncio.Task[Any]]
            tasks = await (self._closed_loop() if self.plan.load.lanes else self._open_loop())
            load_ended_at = self.clock.now()
            await changing
            busy = meter.busy_cores() if meter is not None else {}
            if tasks:
                _, late = await asyncio.wait(tasks, timeout=_DRAIN_S)
                for task in late:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            if sampler is not None:
                sampler.cancel()
                await asyncio.gather(sampler, return_exceptions=True)
        return {
            "load_ended_at": load_ended_at, "ended_at": self.clock.now(), "requests": self.requests,
            "changes": self.changes, "memory": self.memory,
            "device_memory": await self.method.device_memory(), "busy_cores": busy,
        }  # fmt: skip

    async def _open_loop(self) -> list[asyncio.Task[RequestRecord]]:
        """Send every request when it is due, whether or not earlier ones have ended."""
        tasks = []
        for arrival in self.plan.workload.arrivals():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._over.wait(), max(0.0, arrival.due_at - self.clock.now()))
            if self._over.is_set():
                break
            tasks.append(asyncio.create_task(self._ask(arrival, arrival.due_at)))
        await self._over.wait()
        return tasks

    async def _closed_loop(self) -> list[asyncio.Task[None]]:
        """Keep so many requests running, each followed by the next one, until the run is over."""
        arrivals = self.plan.workload.arrivals()
        lanes = [asyncio.create_task(self._lane(arrivals)) for _ in range(self.plan.load.lanes or 0)]
        await self._over.wait()
        return lanes

    async def _lane(self, arrivals: Iterator[Arrival]) -> None:
        while not self._over.is_set():
            request = await self._ask(next(arrivals), self.clock.now())
            if request.error is not None:
                await asyncio.sleep(_AFTER_FAILURE_S)

    async def _ask(self, arrival: Arrival, due_at: float) -> RequestRecord:
        ask = Ask(key=str(arrival.request_id), prompt=arrival.prompt, tokens=arrival.output_tokens)
        stream = StreamRecord(lane=0, ask=ask, sent_at=time.monotonic())
        request = RequestRecord(
            request_id=arrival.request_id,
            due_at=due_at,
            sent_at=self.clock.of(stream.sent_at),
            wanted=arrival.output_tokens,
            generation=-1,
            ended_at=0.0,
        )
        self.requests.append(request)
        try:
            request.generation = await self.method.ask(stream)
        finally:
            request.arrivals = [self.clock.of(at) for at in stream.arrivals]
            request.token_ids = stream.token_ids
            request.ended_at = self.clock.of(stream.ended_at or time.monotonic())
            request.error = stream.failure
        return request

    async def _change(self) -> None:
        try:
            for old, new in itertools.pairwise(self.plan.run.sizes):
                await asyncio.sleep(self.plan.seconds)
                self.changes.append(await self._one_change(old, new))
                if self.changes[-1].error is not None:
                    break
            await asyncio.sleep(self.plan.seconds)
            if self.plan.run.measures_capacity:
                await self._enough((self.plan.load.lanes or 0) * (1 + _ROUNDS))
        finally:
            self._over.set()

    async def _enough(self, count: int) -> None:
        """Wait until so many requests have ended, or for as long as a closed loop may take."""
        while self.clock.now() < _LONGEST_S and sum(request.ended_at > 0 for request in self.requests) < count:
            await asyncio.sleep(_LOOK_S)

    async def _one_change(self, old: int, new: int) -> ChangeRecord:
        if self.plan.run.rebalance:
            assert isinstance(self.method, Elastic)
            record = await self.method.rebalance()
            self.say(f"{self.method.name}: {record.error or record.detail}")
            return record
        if old == new:
            now = self.clock.now()
            await asyncio.sleep(_NOTHING_S)
            return ChangeRecord(
                requested_at=now, old_size=old, new_size=new, effective_at=now, ended_at=self.clock.now()
            )
        if isinstance(self.method, Elastic):
            await self.method.standby_ready()
        record = await self.method.change(new)
        took = record.ended_at - record.requested_at
        self.say(f"{self.method.name}: {old} -> {new}: {record.error or 'done'} after {took:.2f} s")
        return record


async def carry_out(
    experiment: Experiment,
    arm: Arm,
    repetition: int,
    method: Method,
    *,
    group: Group | None,
    about: dict[str, Any],
    say: Callable[[str], None],
    keep: Callable[[RunLog], None],
) -> None:
    """All runs of an arm, from one start of its servers; `keep` gets each log as soon as there is one.

    Args:
        repetition: also the seed of the order and of the requests: two methods get the same ones.
        group: that the method's servers enter; None: memory and CPU time are not measured.

    Raises:
        ServerFailed: the first server did not start. MethodFailed: it does not answer as it should.
    """
    first = [run for run in arm.runs if run.measures_capacity]
    others = [run for run in arm.runs if not run.measures_capacity]
    random.Random(f"{repetition}/{arm.name}").shuffle(others)
    capacity: dict[int, float] = {}
    say(f"{arm.name}, repetition {repetition}: starting")
    try:
        await method.start(arm.runs[0].sizes[0])
        await warm_up(method, method.size)
        for run in (*first, *others):
            if method.size != run.sizes[0]:
                record = await method.change(run.sizes[0])
                if record.error is not None:
                    raise MethodFailed(f"{arm.name}: {record.old_size} -> {record.new_size}: {record.error}")
                await warm_up(method, method.size)
            plan = make_plan(experiment, run, repetition, capacity)
            say(f"{arm.name}, repetition {repetition}: {run.name}")
            found = await Recorder(method, plan, say).record(group)
            log = RunLog(
                arm=arm.name, run=run.name, repetition=repetition, method=arm.method, load=plan.load,
                capacity=dict(capacity), about=about, **found,
            )  # fmt: skip
            if run.measures_capacity:
                capacity[run.sizes[0]] = capacity_of(log)
            keep(log)
    finally:
        await method.stop()


def make_plan(experiment: Experiment, run: Run, repetition: int, capacity: dict[int, float]) -> Plan:
    """Raises KeyError where an open loop's capacity was not measured."""
    if run.share is None:
        load = Load(lanes=run.lanes or experiment.lanes)
    else:
        load = Load(rate=round(run.share * capacity[run.sizes[0]], 3), share=run.share)
    workload = Workload(
        rate=load.rate or 1.0,
        prompt=Lengths.parse(experiment.prompt),
        output=Lengths.parse(experiment.output),
        seed=repetition,
    )
    return Plan(run=run, workload=workload, load=load, seconds=run.seconds or experiment.seconds)


def capacity_of(log: RunLog) -> float:
    """Requests a second of a closed loop, by the tokens that came after each lane's first request.

    Raises:
        MethodFailed: so few requests ended that a rate would mean nothing.
    """
    lanes = log.load.lanes or 1
    ended = sorted(request.ended_at for request in log.requests if 0 < request.ended_at <= log.load_ended_at)
    if len(ended) < 2 * lanes:
        raise MethodFailed(
            f"{log.arm}: {log.run}: {len(ended)} requests of {lanes} lanes ended in {log.load_ended_at:.0f} s: too few "
            "for a capacity"
        )
    start = ended[lanes - 1]
    tokens = sum(start <= at < log.load_ended_at for request in log.requests for at in request.arrivals)
    return tokens / (log.load_ended_at - start) / statistics.mean(request.wanted for request in log.requests)
