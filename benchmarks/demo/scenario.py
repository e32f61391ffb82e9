"""The sequence of the demo (reference, load, changes), and its record, which views and figures read."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
import msgspec

from benchmarks.demo.settings import Settings
from benchmarks.server import ElasticServer
from benchmarks.streams import Load, StreamClient, StreamRecord, unequal
from elasticmoe_sglang.coordinator.status import Operation, Phase, Status

_IDLE_POLL_S = 0.5
_CHANGE_POLL_S = 0.1
_CHANGE_TIMEOUT_S = 300.0
RATE_BIN_S = 0.5


class View(Protocol):
    """Receives what happens in the demo."""

    def say(self, text: str) -> None:
        """One line that stays."""

    def waiting(self, seconds: float) -> None:
        """The server has been starting for so long."""


@dataclass(kw_only=True)
class Change:
    """One change as the demo asked for it. Times are `time.monotonic()`."""

    old: int
    new: int
    asked_at: float
    ended_at: float | None = None
    operation: Operation | None = None
    error: str | None = None
    """Why there is no operation: the server refused or did not answer."""

    @property
    def done(self) -> bool:
        return self.error is None and self.operation is not None and self.operation.phase is Phase.DONE


class DemoFailed(Exception):
    """The demo cannot continue; the text says why."""


@dataclass(kw_only=True)
class Progress:
    """The record so far; a view may read it from another thread at any time."""

    settings: Settings
    started_at: float
    stage: str = ""
    status: Status | None = None
    reference: list[StreamRecord] = field(default_factory=list)
    records: list[StreamRecord] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    load_ended_at: float | None = None
    boot_s: float = 0.0
    bins: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=600))
    """(number of the half second since the start, tokens that arrived in it), for the live picture."""

    def count(self, record: StreamRecord, tokens: int) -> None:
        """Tokens arrived."""
        number = int((time.monotonic() - self.started_at) / RATE_BIN_S)
        if self.bins and self.bins[-1][0] == number:
            self.bins[-1] = (number, self.bins[-1][1] + tokens)
        else:
            self.bins.append((number, tokens))

    def rates(self, bins: int) -> list[float]:
        """Tokens per second in the last full half seconds, oldest first."""
        counts = dict(self.bins.copy())
        now = int((time.monotonic() - self.started_at) / RATE_BIN_S)
        first = max(0, now - bins)
        return [counts.get(number, 0) / RATE_BIN_S for number in range(first, now)]

    @property
    def mismatches(self) -> list[str]:
        return unequal([record for record in self.records if record.complete], self.reference)


async def play(settings: Settings, server: ElasticServer, progress: Progress, view: View) -> None:
    """Everything from the first stream to the last. The server must be up.

    Raises:
        ServerFailed: the server died meanwhile.
        DemoFailed: it does not answer as it should before anything was changed.
    """
    progress.boot_s = server.boot_s
    tasks = [asyncio.create_task(_play(settings, server, progress, view)), asyncio.create_task(server.died())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        # One of the two has ended; if it was the server, this raises.
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _play(settings: Settings, server: ElasticServer, progress: Progress, view: View) -> None:
    timeout = aiohttp.ClientTimeout(total=_CHANGE_TIMEOUT_S)
    async with (
        aiohttp.ClientSession(server.url, timeout=timeout) as session,
        StreamClient(server.url, progress.count) as client,
    ):
        watcher = asyncio.create_task(_watch(session, progress))
        try:
            await _reference(settings, client, progress, view)
            load = Load(client, settings.choose)
            progress.records = load.records
            lanes = asyncio.create_task(load.run(settings.streams))
            try:
                await _changes(settings, session, progress, view)
                progress.stage = "waiting for the last streams to end"
                progress.load_ended_at = time.monotonic()
                load.stop()
                await lanes
            finally:
                lanes.cancel()
        finally:
            watcher.cancel()


async def _reference(settings: Settings, client: StreamClient, progress: Progress, view: View) -> None:
    """The model's answers while nothing changes; every later stream is compared with them."""
    progress.stage = "reference: every prompt once, nothing changes"
    asks = settings.reference_asks()
    load = Load(client, settings.choose)
    progress.reference = load.records
    await load.run_once(asks)
    failed = [record.failure for record in load.records if not record.complete]
    if failed:
        raise DemoFailed(f"{len(failed)} of {len(asks)} streams failed before any change: {failed[0]}")
    view.say(f"reference: {len(asks)} prompts with {settings.tokens} tokens each at EP size {settings.sizes[0]}")


async def _changes(settings: Settings, session: aiohttp.ClientSession, progress: Progress, view: View) -> None:
    progress.stage = "steady"
    view.say(f"load: {settings.streams} streams decode from now on; each that ends is replaced by another")
    await asyncio.sleep(settings.steady_s)
    for old, new in zip(settings.sizes, settings.sizes[1:], strict=False):
        progress.stage = f"change {old} -> {new}"
        change = Change(old=old, new=new, asked_at=time.monotonic())
        progress.changes.append(change)
        view.say(f"EP size {old} -> {new}: requested")
        await _change(session, change)
        view.say(_outcome(change))
        if not change.done:
            return
        progress.status = await _status(session)
        progress.stage = "steady"
        await asyncio.sleep(settings.steady_s)


async def _change(session: aiohttp.ClientSession, change: Change) -> None:
    try:
        async with session.post("/scale_elastic_ep", json={"new_ep_size": change.new, "wait": True}) as response:
            answer = await response.read()
            if response.status == 200:
                change.operation = msgspec.json.decode(answer, type=Operation)
            else:
                change.error = f"status {response.status}: {answer.decode(errors='replace')[:300]}"
    except (aiohttp.ClientError, asyncio.TimeoutError, msgspec.DecodeError) as error:
        change.error = f"{type(error).__name__}: {error}"
    change.ended_at = time.monotonic()


def _outcome(change: Change) -> str:
    operation = change.operation
    head = f"EP size {change.old} -> {change.new}:"
    if operation is None:
        return f"{head} {change.error}"
    if not change.done:
        return f"{head} {operation.phase.value}, {operation.error}"
    return (
        f"{head} done in {(operation.timings.total_ms or 0) / 1000:.2f} s, {operation.columns_moved} expert columns "
        f"and {operation.moved_requests} requests moved; epoch {operation.epoch}"
    )


async def _status(session: aiohttp.ClientSession) -> Status:
    async with session.get("/elastic_ep/status") as response:
        if response.status != 200:
            raise DemoFailed(f"/elastic_ep/status answered {response.status}: {(await response.text())[:300]}")
        return msgspec.json.decode(await response.read(), type=Status)


async def _watch(session: aiohttp.ClientSession, progress: Progress) -> None:
    """Keep `progress.status` up to date, for the views only."""
    while True:
        # A status that cannot be had ends the demo after the next change, and a dead server ends it at once.
        with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, DemoFailed):
            progress.status = await _status(session)
        changing = bool(progress.changes) and progress.changes[-1].ended_at is None
        await asyncio.sleep(_CHANGE_POLL_S if changing else _IDLE_POLL_S)
