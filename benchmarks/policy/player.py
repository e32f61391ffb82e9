"""Plays a load open-loop against a running server, judges its answers by an SLO, and adds up the ranks it held."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.policy.traces import Request, Trace
from benchmarks.streams import Ask, Load, StreamClient, StreamRecord
from elasticmoe_sglang.coordinator.status import Operation, Phase
from elasticmoe_sglang.policy.settings import Slo
from elasticmoe_sglang.tiny_model import SPECIAL_TOKENS, VOCAB

_DRAIN_S = 60.0
_LAG_TICK_S = 0.05


def ask(request: Request, key: str) -> Ask:
    """Its prompt is random tokens that no other request of another key begins with, so no cache answers for it."""
    rng = random.Random(key)
    prompt = tuple(rng.randrange(len(SPECIAL_TOKENS), VOCAB) for _ in range(request.prompt_tokens))
    return Ask(key=key, prompt=prompt, tokens=request.output_tokens)


@dataclass(frozen=True, kw_only=True)
class Played:
    """What became of a trace.

    Attributes:
        records: of each request; `sent_at` is when it was due, so what the client was late counts as waiting.
        started_at: `time.monotonic()` of second 0; started_unix: the same as Unix time.
        lag_s: the longest time that the client's event loop was late.
    """

    records: list[StreamRecord]
    started_at: float
    started_unix: float
    lag_s: float


async def play(url: str, trace: Trace) -> Played:
    """Send every request when it is due, whatever became of the earlier ones; wait a minute for the last answers."""
    async with StreamClient(url) as client:
        records: list[StreamRecord] = []
        asks = [ask(request, f"{trace.name} {number}") for number, request in enumerate(trace.requests)]
        lags: list[float] = [0.0]
        watch = asyncio.create_task(_watch_lag(lags))
        started, unix = time.monotonic(), time.time()
        tasks = []
        for number, (request, wanted) in enumerate(zip(trace.requests, asks, strict=True)):
            await asyncio.sleep(started + request.at - time.monotonic())
            records.append(StreamRecord(lane=number, ask=wanted, sent_at=started + request.at))
            tasks.append(asyncio.create_task(client.run(records[-1])))
        await asyncio.sleep(started + trace.duration_s - time.monotonic())
        watch.cancel()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_DRAIN_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return Played(records=records, started_at=started, started_unix=unix, lag_s=max(lags))


async def _watch_lag(lags: list[float]) -> None:
    while True:
        due = time.monotonic() + _LAG_TICK_S
        await asyncio.sleep(_LAG_TICK_S)
        lags.append(time.monotonic() - due)


def ttft_s(record: StreamRecord) -> float | None:
    """Seconds from when it was due until its first token."""
    return record.arrivals[0] - record.sent_at if record.arrivals else None


def itl_s(record: StreamRecord) -> float | None:
    """Mean seconds between its tokens; None for fewer than two."""
    if len(record.arrivals) < 2:
        return None
    return (record.arrivals[-1] - record.arrivals[0]) / (len(record.arrivals) - 1)


def met(record: StreamRecord, slo: Slo) -> bool:
    """Whether the answer is complete and within both limits."""
    first, pace = ttft_s(record), itl_s(record)
    prompt = slo.ttft_s is None or (first is not None and first <= slo.ttft_s)
    paced = slo.itl_s is None or pace is None or pace <= slo.itl_s
    return record.complete and prompt and paced


def held_ranks(
    first: int, operations: Sequence[Operation], started_unix: float, duration_s: float
) -> tuple[float, list[tuple[float, int]]]:
    """(rank-seconds from second 0 to `duration_s`, (second, size) of the start and of every change that was made).

    A change holds the larger of its two sizes from its request until it has ended, as joining ranks occupy devices
    before they serve.

    Args:
        first: size at second 0. operations: ended ones, in any order.
    """
    total, now, size = 0.0, 0.0, first
    sizes = [(0.0, first)]
    for operation in sorted(operations, key=lambda operation: operation.created_at):
        begin = min(max(operation.created_at - started_unix, now), duration_s)
        end = min(max(begin, begin + (operation.timings.total_ms or 0.0) / 1000), duration_s)
        total += size * (begin - now) + max(operation.old_ep_size, operation.new_ep_size) * (end - begin)
        now = end
        if operation.phase is Phase.DONE and begin < duration_s:
            size = operation.new_ep_size
            sizes.append((round(end, 2), size))
    return total + size * (duration_s - now), sizes


async def closed_loop(url: str, streams: int, request: Request, settle_s: float, seconds: float) -> list[StreamRecord]:
    """Keep so many such requests running, each followed by the next; the records of `settle_s` + `seconds`."""
    async with StreamClient(url) as client:
        load = Load(client, lambda lane, number: ask(request, f"closed {streams} {lane} {number}"))
        lanes = asyncio.create_task(load.run(streams))
        await asyncio.sleep(settle_s + seconds)
        load.stop()
        lanes.cancel()
        await asyncio.gather(lanes, return_exceptions=True)
    return load.records


def tokens_between(records: Sequence[StreamRecord], begin: float, end: float) -> int:
    """Tokens that arrived in this span of `time.monotonic()`."""
    return sum(begin <= moment < end for record in records for moment in record.arrivals)
