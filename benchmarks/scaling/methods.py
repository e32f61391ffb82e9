"""The methods to change a service's size: this project's, and those a user has today.

A method owns the servers, routes requests, and carries out a change. All of them run real servers.
"""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

from benchmarks.scaling.ablation import environment
from benchmarks.scaling.clock import Clock
from benchmarks.scaling.records import ChangeRecord, DevicePeak
from benchmarks.scaling.servers import Instance, ServerSettings
from benchmarks.server import ServerFailed
from benchmarks.streams import Ask, StreamRecord
from elasticmoe_sglang.cpu_bind import usable_cores

_POLL_S = 0.02
_DRAIN_S = 120.0
FIRST_BOOT_S = 600.0
NO_SERVER = "refused: no server takes requests"


class MethodFailed(Exception):
    """A server does not answer as it should; the text says which request and what came back."""


class Method(ABC):
    """Args:
    settings: of its servers.
    capacity: the largest size that it may get.

    Attributes:
        serving: instances that take new requests, in turn.
    """

    name: str
    has_ledger = False

    def __init__(self, settings: ServerSettings, capacity: int) -> None:
        self.settings = settings
        self.capacity = capacity
        self.serving: list[Instance] = []
        self.running: list[Instance] = []
        self.clock = Clock()
        self._generation = 0
        self._turn = 0

    async def start(self, size: int) -> None:
        """Returns once it serves at this size, every rank warmed up."""
        instance = await self.boot(size)
        self.serving = [instance]

    async def begin(self, clock: Clock) -> None:
        """A run starts now: caches are empty, so that equal prompts of two runs cost the same."""
        for instance in self.running:
            await _flush(instance)
        self.clock = clock

    async def change(self, size: int) -> ChangeRecord:
        """Change to the new size; returns when nothing is left to do. Never raises for a change that failed."""
        return await self._recorded(size, lambda record: self.apply_commit(size, record))

    async def _recorded(self, size: int, apply: Callable[[ChangeRecord], Awaitable[None]]) -> ChangeRecord:
        old, requested = self.size, self.clock.now()
        record = ChangeRecord(
            requested_at=requested, old_size=old, new_size=size, effective_at=None, ended_at=requested
        )
        try:
            await apply(record)
        except (ServerFailed, MethodFailed, aiohttp.ClientError, asyncio.TimeoutError) as error:
            # The run continues and reports it. What follows the first line is the tail of a server's log.
            record.error = str(error).splitlines()[0] if str(error) else type(error).__name__
        record.ended_at = self.clock.now()
        return record

    @abstractmethod
    async def apply_commit(self, size: int, record: ChangeRecord) -> None:
        """Do it, and fill `generation`, `effective_at` and `detail`."""

    @property
    def size(self) -> int:
        return sum(instance.size for instance in self.serving)

    async def ask(self, record: StreamRecord) -> int:
        """Send one request where the method sends it now; returns that server's generation, -1 for none."""
        if not self.serving:
            record.failure, record.ended_at = NO_SERVER, time.monotonic()
            return -1
        instance = self.serving[self._turn % len(self.serving)]
        self._turn += 1
        await instance.ask(record)
        return instance.generation

    async def device_memory(self) -> list[DevicePeak]:
        """From a ledger, where the method has one."""
        return []

    async def stop(self) -> None:
        self.serving = []
        for instance in list(self.running):
            await self.end(instance)

    # -- for the methods ------------------------------------------------------------------------------------------

    def make(self, size: int) -> Instance:
        return self._instance(self.settings.plain(size, self.kv_tokens), plain=True, size=size)

    @property
    def kv_tokens(self) -> int:
        return self.settings.kv_tokens

    def cores(self, size: int) -> set[int] | None:
        """Those that a new server of this size gets for itself; None: all, as no other server runs."""
        return None

    def _instance(self, args: list[str], *, plain: bool, size: int) -> Instance:
        log = self.settings.log_dir / f"{self.name}-{self._generation}.log"
        limit = self.settings.boot_limit_s if self._generation else FIRST_BOOT_S
        env = {} if plain else environment(self.settings.without)
        cores = self.cores(size)

        def enter() -> None:
            self.settings.enter()
            if cores is not None:
                os.sched_setaffinity(0, cores)

        instance = Instance(
            args, plain=plain, generation=self._generation, size=size, log=log, start_timeout_s=limit, env=env,
            enter=enter,
        )  # fmt: skip
        self._generation += 1
        return instance

    async def boot(self, size: int) -> Instance:
        instance = self.make(size)
        self.running.append(instance)
        try:
            await instance.__aenter__()
        except BaseException:
            self.running.remove(instance)
            raise
        return instance

    async def end(self, instance: Instance, *, drain: bool = False) -> None:
        """Stop it; with `drain` once its requests have ended. SGLang itself lets running requests end for a while."""
        deadline = time.monotonic() + _DRAIN_S
        while drain and instance.in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        await instance.__aexit__()
        self.running.remove(instance)


async def warm_up(method: Method, size: int) -> None:
    """Each rank generates a few tokens twice, so that one-time work is not measured."""
    for _ in range(2):
        records = [
            StreamRecord(lane=lane, ask=Ask(key="warm", prompt="import os", tokens=4), sent_at=time.monotonic())
            for lane in range(2 * size)
        ]
        await asyncio.gather(*(method.ask(record) for record in records))
        failures = [record.failure for record in records if record.failure]
        if failures:
            raise MethodFailed(f"{method.name}: a request before the run failed: {failures[0]}")


class Plain(Method):
    """SGLang without this project, at one size: what a restart or a fixed size gives."""

    name = "plain"

    async def apply_commit(self, size: int, record: ChangeRecord) -> None:
        raise AssertionError("no experiment changes its size")


class ColdRestart(Method):
    """The server is stopped and started again at the new size."""

    name = "cold-restart"

    async def apply_commit(self, size: int, record: ChangeRecord) -> None:
        [old] = self.serving
        self.serving = []
        await self.end(old)
        new = await self.boot(size)
        self.serving = [new]
        record.generation, record.effective_at = new.generation, self.clock.now()


class Replica(Method):
    """A second server next to the first, requests in turn; to shrink, one is drained and stopped.

    Each server has cores of its own, one for each of its devices, as it would have devices of its own.
    """

    name = "replica"

    def cores(self, size: int) -> set[int] | None:
        available = usable_cores()
        held = sum(instance.size for instance in self.running)
        return set(available[held : held + size]) if held + size <= len(available) else None

    async def apply_commit(self, size: int, record: ChangeRecord) -> None:
        if size > self.size:
            new = await self.boot(size - self.size)
            self.serving.append(new)
            record.generation, record.effective_at = new.generation, self.clock.now()
            return
        surplus = self.size - size
        retiring = next((instance for instance in self.serving if instance.size == surplus), None)
        if retiring is not None:
            self.serving.remove(retiring)
            record.effective_at = self.clock.now()
            await self.end(retiring, drain=True)
            return
        await _switch(self, size, record)


class Colocated(Method):
    """Old and new server side by side on the same devices, each with half of the KV memory from the start; then all
    requests go to the new one and the old one is drained and stopped."""

    name = "colocated"

    @property
    def kv_tokens(self) -> int:
        return self.settings.kv_tokens // 2

    async def apply_commit(self, size: int, record: ChangeRecord) -> None:
        await _switch(self, size, record)


async def _switch(method: Method, size: int, record: ChangeRecord) -> None:
    """A new server for everything; the old ones end once their requests have."""
    old = list(method.serving)
    new = await method.boot(size)
    method.serving = [new]
    record.generation, record.effective_at = new.generation, method.clock.now()
    for instance in old:
        await method.end(instance, drain=True)


class Elastic(Method):
    """This project: ranks join or retire while the server runs."""

    name = "elastic"
    has_ledger = True

    def __init__(self, settings: ServerSettings, capacity: int) -> None:
        super().__init__(settings, capacity)
        self._before: dict[int, int] = {}

    def make(self, size: int) -> Instance:
        return self._instance(self.settings.elastic(size, self.capacity), plain=False, size=size)

    async def begin(self, clock: Clock) -> None:
        await self.standby_ready()
        await super().begin(clock)
        self._before = {device["device"]: device["used"] for device in await self._devices()}

    async def standby_ready(self) -> None:
        """Until a standby waits, where a rank could join: replacing one that was used is not part of a change."""
        deadline = time.monotonic() + _DRAIN_S
        while time.monotonic() < deadline:
            states = [rank["state"] for rank in (await self._status())["ranks"]]
            if "standby" in states or not {"inactive", "starting"} & set(states):
                return
            await asyncio.sleep(_POLL_S)
        raise MethodFailed(f"no standby within {_DRAIN_S:g} s")

    async def apply_commit(self, size: int, record: ChangeRecord) -> None:
        await self._take(await self._ask("/scale_elastic_ep", {"new_ep_size": size}), size, record)

    async def rebalance(self) -> ChangeRecord:
        """Place columns by the routing of the present load; observing it is before the change."""

        async def apply(record: ChangeRecord) -> None:
            answer = await self._ask("/elastic_ep/rebalance", {})
            if answer["operation"] is None:
                raise MethodFailed(f"nothing was moved: {answer['note']}")
            record.requested_at = self.clock.of_unix(answer["operation"]["created_at"])
            await self._take(answer["operation"], self.size, record)
            record.detail |= {name: answer[name] for name in ("imbalance", "expected_imbalance", "columns")}

        return await self._recorded(self.size, apply)

    async def _take(self, operation: dict[str, Any], size: int, record: ChangeRecord) -> None:
        """What an ended operation says of its change."""
        [instance] = self.serving
        timings = operation["timings"]
        record.generation = instance.generation
        record.detail = {
            name: operation[name]
            for name in ("operation_id", "timings", "columns_moved", "bytes_moved", "moved_requests", "pause_ms")
        }
        if operation["phase"] != "done":
            record.error = operation["error"] or f"ended as {operation['phase']}"
            return
        # By the Coordinator's clock: when all ranks had reported that they passed the commit barrier.
        phases = ("planned_ms", "preparing_ms", "committing_ms")
        spent_s = sum(timings[phase] or 0.0 for phase in phases) / 1e3
        record.effective_at = self.clock.of_unix(operation["created_at"]) + spent_s
        instance.size = size
        joined = [rank for rank in (await self._status())["ranks"] if rank["rank"] in operation["joining"]]
        if joined:
            record.detail["weights_s"] = max(rank["load_s"] for rank in joined)
            record.detail["checkpoint_bytes"] = sum(rank["checkpoint_bytes"] for rank in joined)

    async def device_memory(self) -> list[DevicePeak]:
        return [
            DevicePeak(
                device=device["device"],
                before=self._before.get(device["device"], 0),
                peak=device["peak"],
                after=device["used"],
            )
            for device in await self._devices()
        ]

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        [instance] = self.serving
        timeout = aiohttp.ClientTimeout(total=600)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(f"{instance.url}{path}", json={**body, "wait": True}) as response,
        ):
            answer: dict[str, Any] = await response.json()
        if response.status != 200:
            raise MethodFailed(f"{path} answered {response.status}: {answer}")
        return answer

    async def _devices(self) -> list[dict[str, Any]]:
        devices: list[dict[str, Any]] = (await self._status())["memory"]["devices"]
        return devices

    async def _status(self) -> dict[str, Any]:
        [instance] = self.serving
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{instance.url}/elastic_ep/status") as response,
        ):
            if response.status != 200:
                raise MethodFailed(f"/elastic_ep/status answered {response.status}: {await response.text()}")
            status: dict[str, Any] = await response.json()
        return status


async def _flush(instance: Instance) -> None:
    """Raises MethodFailed when it stays busy."""
    deadline = time.monotonic() + _DRAIN_S
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < deadline:
            async with session.post(f"{instance.url}/flush_cache") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(_POLL_S)
    raise MethodFailed(f"its cache could not be flushed within {_DRAIN_S:g} s")


METHODS: dict[str, type[Method]] = {method.name: method for method in (Elastic, Plain, ColdRestart, Replica, Colocated)}
