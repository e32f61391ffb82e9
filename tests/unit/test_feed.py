"""The events: what each reader gets and when, that the coordinator is asked once for all, and that streams end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest
from msgspec import UNSET

from elasticmoe_sglang.api import feed as feed_module
from elasticmoe_sglang.api.feed import MAX_READERS, OPERATIONS, Event, Feed
from elasticmoe_sglang.coordinator.status import MemoryStatus, Phase, Status
from elasticmoe_sglang.errors import TooManyReaders
from elasticmoe_sglang.live_figures import LiveFigures
from elasticmoe_sglang.planner import ScaleTo
from tests.helpers.fake_cluster import FakeCluster


class Clock:
    def __init__(self) -> None:
        self.now = 1000.5

    def __call__(self) -> float:
        return self.now


class Cluster(FakeCluster):
    """Counts how often its memory is asked for, and is slow where a test says so."""

    slow_s = 0.0
    asked = 0

    async def status(self) -> MemoryStatus:
        self.asked += 1
        await asyncio.sleep(self.slow_s)
        return await super().status()


async def next_event(stream: AsyncIterator[bytes]) -> Event:
    while True:
        frame = await asyncio.wait_for(anext(stream), 60)
        if frame.startswith(b"event: state\ndata: ") and frame.endswith(b"\n\n"):
            assert frame.count(b"\n") == 3
            return msgspec.json.decode(frame.removeprefix(b"event: state\ndata: "), type=Event)
        assert frame == b": no news\n\n"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "PERIOD_S", 0.05)
    monkeypatch.setattr(feed_module, "_LOOK_S", 0.005)
    monkeypatch.setattr(feed_module, "_SIGN_OF_LIFE_S", 0.1)


def test_a_reader_gets_everything_first_and_then_what_is_new() -> None:
    async def scenario() -> None:
        clock = Clock()
        figures = LiveFigures(clock=clock)
        figures.tokens(5)
        clock.now += 2
        feed = Feed(FakeCluster().coordinator(), figures, model="tiny")
        async with aclosing(feed.open()) as stream:  # type: ignore[type-var]
            first = await next_event(stream)
            assert (first.model, first.status.membership, first.operations) == ("tiny", [0, 1], [])
            assert [(second.at, second.tokens) for second in first.figures] == [(1000, 5), (1001, 0)]
            clock.now += 1
            second = await next_event(stream)
            assert [entry.at for entry in second.figures] == [1002]
            assert second.operations is UNSET and second.instance == first.instance
            assert (await next_event(stream)).figures == []

    asyncio.run(scenario())


def test_a_change_is_told_at_once_and_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "PERIOD_S", 60.0)

    async def scenario() -> None:
        coordinator = FakeCluster(faults={"boot 2": "hang"}).coordinator(prepare_deadline_s=0.3)
        feed = Feed(coordinator, LiveFigures())
        async with aclosing(feed.open()) as stream:  # type: ignore[type-var]
            await next_event(stream)
            operation = await coordinator.submit(ScaleTo(size=3))
            event = await next_event(stream)
            assert event.status.running is not None and event.status.running.moves
            assert event.operations is not UNSET
            [told] = event.operations
            assert told.operation_id == operation.operation_id and told.moves == []
            phases = {told.phase}
            while (event := await next_event(stream)).status.running is not None:
                phases.add(event.status.running.phase)
            assert Phase.PREPARING in phases
            assert event.operations is not UNSET and event.operations[0].phase is Phase.ROLLED_BACK

    asyncio.run(scenario())


def test_operations_are_the_latest_few() -> None:
    async def scenario() -> None:
        coordinator = FakeCluster().coordinator()
        for number in range(OPERATIONS + 3):
            await coordinator.submit(ScaleTo(size=2), f"n{number}")
        async with aclosing(Feed(coordinator, LiveFigures()).open()) as stream:  # type: ignore[type-var]
            event = await next_event(stream)
        assert event.operations is not UNSET
        assert [operation.operation_id for operation in event.operations][:2] == ["n22", "n21"]
        assert len(event.operations) == OPERATIONS

    asyncio.run(scenario())


def test_many_readers_ask_once_and_nobody_asks_without_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "PERIOD_S", 60.0)

    async def scenario() -> None:
        cluster = Cluster()
        feed = Feed(cluster.coordinator(), LiveFigures())
        streams = [feed.open() for _ in range(10)]
        events = [await next_event(stream) for stream in streams]
        assert cluster.asked == 1 and len({event.at for event in events}) == 1
        for stream in streams:
            await stream.aclose()  # type: ignore[attr-defined]
        monkeypatch.setattr(feed_module, "PERIOD_S", 0.01)
        await asyncio.sleep(0.1)
        assert cluster.asked == 1, "nobody reads any more"
        async with aclosing(feed.open()) as stream:  # type: ignore[type-var]
            assert (await next_event(stream)).at > events[0].at, "what was seen before is not shown as new"

    asyncio.run(scenario())


def test_a_slow_hmm_delays_events_and_not_the_signs_of_life() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        cluster.slow_s = 0.35
        async with aclosing(Feed(cluster.coordinator(), LiveFigures()).open()) as stream:  # type: ignore[type-var]
            assert await asyncio.wait_for(anext(stream), 60) == b": no news\n\n"
            assert (await next_event(stream)).status.memory.available

    asyncio.run(scenario())


def test_streams_end_with_the_server() -> None:
    async def scenario() -> None:
        ends = False
        feed = Feed(FakeCluster().coordinator(), LiveFigures(), ending=lambda: ends)
        streams = [feed.open() for _ in range(3)]
        for stream in streams:
            await next_event(stream)
        ends = True
        for stream in streams:
            with pytest.raises(StopAsyncIteration):
                while True:
                    await asyncio.wait_for(anext(stream), 60)

    asyncio.run(scenario())


def test_an_error_ends_the_stream() -> None:
    class Broken(FakeCluster):
        def ranks(self) -> list[object]:  # type: ignore[override]
            raise RuntimeError("no ranks")

    async def scenario() -> None:
        stream = Feed(Broken().coordinator(), LiveFigures()).open()
        with pytest.raises(RuntimeError, match="no ranks"):
            await next_event(stream)

    asyncio.run(scenario())


def test_readers_are_limited() -> None:
    async def scenario() -> None:
        feed = Feed(FakeCluster().coordinator(), LiveFigures())
        streams = [feed.open() for _ in range(MAX_READERS)]
        for stream in streams:
            await next_event(stream)
        with pytest.raises(TooManyReaders, match="Close one"):
            feed.open()
        await streams[0].aclose()  # type: ignore[attr-defined]
        await next_event(feed.open())

    asyncio.run(scenario())


def test_a_coordinator_in_the_loop_of_another_thread() -> None:
    seen = set()

    class Watched(FakeCluster):
        async def status(self) -> MemoryStatus:
            seen.add(threading.get_ident())
            return await super().status()

    async def scenario() -> Status:
        async with aclosing(Feed(Watched().coordinator(), LiveFigures(), loop=loop).open()) as stream:  # type: ignore[type-var]
            return (await next_event(stream)).status

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        assert asyncio.run(scenario()).membership == [0, 1]
        assert seen == {thread.ident}
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(60)  # what was cancelled ends
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
