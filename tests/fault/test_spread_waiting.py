"""Ranks that join get requests that wait on the others, at once: tokens, aborts, and deaths on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.helpers.elastic import RANKS, commit_time
from tests.helpers.faults import arm, armed, ask_for, whole
from tests.helpers.load import Load, Stream, settled
from tests.helpers.shared import SLOTS, Faulty, Shared

pytestmark = [pytest.mark.server, pytest.mark.shared("faulty"), pytest.mark.timeout(300)]

OLD = 2
"""Ranks at first."""
COUNT = 5 * OLD * SLOTS


@pytest.fixture
def bench(shared: Shared) -> Iterator[Faulty]:
    faulty = shared.faulty()
    faulty.at_two()
    yield faulty
    faulty.at_two()


def overload(bench: Faulty, load: Load) -> list[Stream]:
    """More requests than two ranks run at a time; the first ones have tokens."""
    streams = [bench.request(load) for _ in range(COUNT)]
    settled(lambda: sum(bool(each.arrivals) for each in streams) >= OLD * SLOTS, 60, "the first requests run")
    return streams


def check(bench: Faulty, load: Load, streams: list[Stream]) -> None:
    load.wait(streams)
    for stream in streams:
        if stream.cut is None:
            stream.check(bench.expected[stream.rid])


def test_waiting_requests_begin_on_the_ranks_that_join(bench: Faulty) -> None:
    with Load(bench.server.url) as load:
        streams = overload(bench, load)
        operation = bench.server.must_scale(RANKS)
        check(bench, load, streams)
    assert operation["spread_requests"] >= SLOTS, operation
    elsewhere = [stream for stream in streams if stream.ranks[0] >= OLD]
    assert len(elsewhere) == operation["spread_requests"]
    assert all(stream.first_at > commit_time(operation) for stream in elsewhere)
    assert all(len(set(stream.ranks)) == 1 for stream in streams), "what had begun stayed"


def test_a_rank_that_retires_at_once_hands_on_what_was_just_given_to_it(bench: Faulty) -> None:
    with Load(bench.server.url) as load:
        streams = overload(bench, load)
        grown = bench.server.must_scale(RANKS)
        bench.server.must_scale(retire=[2, 3])
        check(bench, load, streams)
    assert grown["spread_requests"] >= SLOTS, grown


def test_an_abort_reaches_a_request_wherever_it_is(bench: Faulty) -> None:
    with Load(bench.server.url) as load:
        streams = overload(bench, load)
        operation = bench.server.scale(RANKS, wait=False)
        while bench.server.status()["running"] is not None:
            waiting = [stream for stream in streams if not stream.arrivals and stream.cut is None]
            for stream in waiting[-1:]:
                load.abort(stream)
            time.sleep(0.02)
        assert bench.server.ended(operation["operation_id"])["phase"] == "done"
        check(bench, load, streams)
    assert any(stream.cut for stream in streams)
    settled(lambda: not any(rank["kv_used"] for rank in bench.server.status()["ranks"]), 10, "nothing runs on")


@pytest.mark.parametrize(
    ("point", "rank"),
    [
        pytest.param("spread.given", 1, id="has given requests up"),
        pytest.param("barrier.after", 3, id="requests are on their way to it"),
    ],
)
def test_nothing_is_lost_when_a_rank_dies(bench: Faulty, point: str, rank: int) -> None:
    with Load(bench.server.url) as load:
        streams = overload(bench, load)
        arm(bench.run_dir, point, rank, "self")
        ask_for(bench.server, {"new_ep_size": RANKS, "wait": True})
        assert not armed(bench.run_dir)
        check(bench, load, streams)
    settled(lambda: whole(bench.server), 60, "the server is whole")
