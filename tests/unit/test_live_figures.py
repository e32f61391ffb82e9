"""The seconds of the operator's page: what is counted into which, and what looking at requests finds."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.live_figures import LOOK_S, LiveFigures, OpenRequests, quantile


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass
class Times:
    created_time: float
    first_token_time: float = 0.0
    finished_time: float = 0.0


@dataclass
class Body:
    stream: bool


@dataclass
class State:
    time_stats: Times
    obj: Body
    finished: bool = False
    output_ids: list[int] = field(default_factory=list)


class Bench:
    """Figures of requests whose tokens come when the test says so."""

    def __init__(self) -> None:
        self.unix, self.counter = Clock(1000.0), Clock(50.0)
        self.figures = LiveFigures(clock=self.unix)
        self.kept: dict[str, State] = {}
        self.requests = OpenRequests(self.figures, lambda rid, state: self.kept.get(rid) is state, clock=self.counter)

    def send(self, rid: str, *, stream: bool = True) -> State:
        state = self.kept[rid] = State(Times(created_time=self.counter.now), Body(stream))
        self.requests.add(rid, state)
        return state

    def token(self, state: State, count: int = 1) -> None:
        state.output_ids += [7] * count
        state.time_stats.first_token_time = state.time_stats.first_token_time or self.counter.now

    def pass_(self, seconds: float) -> None:
        self.unix.now += seconds
        self.counter.now += seconds


def test_a_stream_of_tokens() -> None:
    bench = Bench()
    state = bench.send("a")
    bench.requests.look()
    bench.pass_(0.25)
    bench.token(state)
    bench.requests.look()
    for _ in range(2):
        bench.pass_(0.1)
        bench.token(state)
        bench.requests.look()
    bench.pass_(0.6)
    [second] = bench.figures.since()
    assert (second.at, second.tokens, second.arrived, second.ended) == (1000, 3, 1, 0)
    assert (second.ttft_p50_ms, second.ttft_p99_ms) == (250.0, 250.0)
    assert second.longest_gap_ms == pytest.approx(100, abs=0.1)
    assert (second.running, second.queued) == (1, 0)


def test_a_gap_shows_while_it_lasts_and_once_it_has_ended() -> None:
    bench = Bench()
    state = bench.send("a")
    bench.token(state)
    bench.requests.look()
    for _ in range(30):
        bench.pass_(0.1)
        bench.requests.look()
    assert [second.longest_gap_ms for second in bench.figures.since()] == pytest.approx([900, 1900, 2900], abs=1)
    bench.token(state)
    bench.requests.look()
    bench.pass_(0.1)
    bench.requests.look()
    bench.pass_(1)
    assert bench.figures.since()[-1].longest_gap_ms == pytest.approx(3000, abs=1), "that it has ended takes it away"


def test_a_request_that_ends_between_two_looks_counts_whole() -> None:
    bench = Bench()
    state = bench.send("a")
    bench.pass_(0.2)
    bench.token(state, 5)
    state.finished, state.time_stats.finished_time = True, bench.counter.now
    del bench.kept["a"]
    bench.pass_(0.3)
    bench.requests.look()
    bench.pass_(1)
    [second] = bench.figures.since()
    assert (second.tokens, second.ended, second.running, second.queued) == (5, 1, 0, 0)
    assert second.ttft_p99_ms == pytest.approx(200) and second.longest_gap_ms == 0
    assert len(bench.requests) == 0


def test_what_sglang_forgets_has_ended() -> None:
    bench = Bench()
    bench.send("a")
    bench.requests.look()
    del bench.kept["a"]
    bench.requests.look()
    assert len(bench.requests) == 0
    first = bench.send("b")
    bench.requests.add("b", first)
    bench.pass_(1)
    assert bench.figures.since()[0].arrived == 2, "sent again, it did not arrive again"
    assert bench.figures.since()[0].ended == 1


def test_requests_that_are_not_streamed_count_tokens_only() -> None:
    bench = Bench()
    state = bench.send("a", stream=False)
    bench.pass_(0.5)
    bench.token(state, 50)
    bench.requests.look()
    bench.pass_(0.4)
    bench.token(state, 50)
    bench.requests.look()
    bench.pass_(0.2)
    [second] = bench.figures.since()
    assert second.tokens == 100 and second.running == 1
    assert second.ttft_p50_ms is None and second.longest_gap_ms is None


def test_idle_seconds_are_there_too_and_old_ones_go() -> None:
    clock = Clock(100.9)
    figures = LiveFigures(seconds=5, clock=clock)
    figures.load(running=3, queued=1)
    figures.tokens(7)
    clock.now = 103.0
    assert [(s.at, s.tokens, s.running, s.queued) for s in figures.since()] == [
        (100, 7, 3, 1),
        (101, 0, 3, 1),
        (102, 0, 3, 1),
    ]
    assert [second.at for second in figures.since(101)] == [102]
    clock.now = 10_000.0
    assert [second.at for second in figures.since()] == [9995, 9996, 9997, 9998, 9999]
    clock.now = 9_000.0
    figures.tokens(1)
    clock.now = 10_001.0
    assert [(second.at, second.tokens) for second in figures.since(9999)] == [(10_000, 1)], "a clock that was set back"


@pytest.mark.process
def test_the_journal_feeds_them() -> None:
    """As the hooks call it: a health check is not counted, and the looking ends with the load."""
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    from elasticmoe_patches.journal import remember
    from elasticmoe_patches.live import live

    async def scenario() -> None:
        states = {rid: State(Times(created_time=0.0), Body(True)) for rid in ("a", f"{HEALTH_CHECK_RID_PREFIX}_1")}
        manager = SimpleNamespace(rid_to_state=states)
        seen = live(manager)
        for rid in states:
            remember(manager, SimpleNamespace(rid=rid))
        remember(manager, SimpleNamespace(rid="gone before it was sent"))
        await asyncio.sleep(3 * LOOK_S)
        states["a"].output_ids += [1, 2, 3]
        states.pop("a").finished = True
        assert len(asyncio.all_tasks()) == 2
        deadline = time.monotonic() + 30
        while len(asyncio.all_tasks()) > 1:
            assert time.monotonic() < deadline, "nobody looks when there is nothing to see"
            await asyncio.sleep(LOOK_S)
        await asyncio.sleep(1.1)
        seconds = seen.figures.since()
        assert sum(second.arrived for second in seconds) == sum(second.ended for second in seconds) == 1
        assert sum(second.tokens for second in seconds) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize(("cost_s", "pause_s"), [(0.0, LOOK_S), (0.0001, LOOK_S), (0.001, 0.1), (1.0, 0.25)])
def test_looks_grow_rarer_with_their_cost(cost_s: float, pause_s: float) -> None:
    """With that in processor time: what else the processor did meanwhile does not count."""

    class Costly(Clock):
        def __call__(self) -> float:
            self.now += cost_s
            return self.now

    class Busy(Clock):
        def __call__(self) -> float:
            self.now += 10
            return self.now

    requests = OpenRequests(LiveFigures(), lambda rid, state: True, clock=Busy(0.0), processor=Costly(0.0))
    assert requests.look() == pytest.approx(pause_s)


@given(st.lists(st.floats(0, 100), max_size=40), st.floats(0.01, 1))
def test_a_quantile_is_a_value_that_enough_others_do_not_exceed(values: list[float], share: float) -> None:
    found = quantile(sorted(values), share)
    if not values:
        assert found is None
        return
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9
    assert all(sum(value <= smaller for value in values) < share * len(values) for smaller in values if smaller < found)
