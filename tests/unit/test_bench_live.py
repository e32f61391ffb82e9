"""The policy's benchmark on a real server: loads, judging, rank-seconds and the report. The server is a stand-in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from aiohttp import web

from benchmarks.policy.live import Governor, as_run
from benchmarks.policy.live_report import Capacity, LiveFigures, LiveRun, Quantiles, markdown
from benchmarks.policy.player import Played, ask, closed_loop, held_ranks, met, play, tokens_between, ttft_s
from benchmarks.policy.traces import KINDS, LIVE, Excerpt, Request, Trace, make_trace
from benchmarks.scaling.workload import Lengths
from benchmarks.streams import Ask, StreamRecord
from elasticmoe_sglang.coordinator.status import Operation, Phase, Timings
from elasticmoe_sglang.planner import Cause
from elasticmoe_sglang.policy.decision import Action, Decision
from elasticmoe_sglang.policy.settings import Autoscale, PolicySettings, parse_slo
from elasticmoe_sglang.policy.view import PolicyView

SLO = parse_slo("ttft=1s,itl=200ms,attainment=0.9")
PROMPT, OUTPUT = Lengths.parse("16-64"), Lengths.parse("24-72")
STARTED = 1000.0


def change(at: float, seconds: float, old: int, new: int, phase: Phase = Phase.DONE) -> Operation:
    return Operation(
        operation_id=f"{at}", cause=Cause.TARGET, phase=phase, message="", target={"new_ep_size": new},
        old_ep_size=old, new_ep_size=new, ranks_before=list(range(old)), ranks_after=list(range(new)), joining=[],
        retiring=[], moves=[], epoch=1, timings=Timings(total_ms=seconds * 1000), created_at=STARTED + at,
        columns_planned=0,
    )  # fmt: skip


def record(due: float, *arrivals: float, tokens: int | None = None) -> StreamRecord:
    count = len(arrivals) if tokens is None else tokens
    made = StreamRecord(lane=0, ask=Ask(key="x", prompt=(1,), tokens=count), sent_at=due)
    made.arrivals, made.token_ids, made.ended_at = list(arrivals), [1] * len(arrivals), due + 9.0
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_an_excerpt_is_the_same_load_faster(kind: str) -> None:
    excerpt = LIVE[kind]
    live = make_trace(kind, 5.0, PROMPT, OUTPUT, excerpt=excerpt)
    assert live.duration_s == excerpt.duration_s <= 360.0 and live.requests[-1].at < live.duration_s
    slow = make_trace(kind, 5.0, PROMPT, OUTPUT)
    share = [
        len([r for r in trace.requests if r.at < end]) / end
        for trace, end in ((live, live.duration_s), (slow, live.duration_s * excerpt.faster))
    ]
    assert share[0] == pytest.approx(share[1], rel=0.2), "requests a second on average"
    late = Excerpt(faster=1.0, duration_s=10.0)
    assert make_trace(kind, 5.0, PROMPT, OUTPUT, excerpt=late).requests == tuple(
        r for r in slow.requests if r.at < 10.0
    )


def test_prompts_are_of_their_length_and_no_two_alike() -> None:
    request = Request(at=0.0, prompt_tokens=20, output_tokens=5)
    first, second = ask(request, "a 1"), ask(request, "a 2")
    assert len(first.prompt) == 20 and first.tokens == 5 and first.prompt[:4] != second.prompt[:4]
    assert ask(request, "a 1") == first and min(first.prompt) >= 3


def test_what_meets_the_slo() -> None:
    assert met(record(0.0, 1.0, 1.2, 1.4), SLO)
    assert not met(record(0.0, 1.01, 1.2), SLO), "first token late"
    assert not met(record(0.0, 0.5, 0.6, 1.0), SLO), "250 ms a token"
    assert not met(record(0.0, 0.5, 0.6, tokens=3), SLO), "a token is missing"
    assert met(record(0.0, 0.9), SLO) and not met(record(0.0, tokens=1), SLO)
    assert met(record(0.0, 5.0, 5.1), parse_slo("itl=200ms"))


def test_ranks_are_held_from_the_request_of_growth_to_the_end_of_shrinking() -> None:
    operations = [change(60.0, 0.5, 2, 1), change(10.0, 2.0, 1, 2)]  # newest first
    total, sizes = held_ranks(1, operations, STARTED, 100.0)
    assert total == pytest.approx(10.0 + 50.5 * 2 + 39.5)
    assert sizes == [(0.0, 1), (12.0, 2), (60.5, 1)]
    failed = [change(10.0, 2.0, 1, 2, Phase.ROLLED_BACK)]
    assert held_ranks(1, failed, STARTED, 100.0) == (pytest.approx(102.0), [(0.0, 1)])
    assert held_ranks(2, [], STARTED, 100.0) == (200.0, [(0.0, 2)])
    outside = [change(150.0, 1.0, 1, 2), change(-5.0, 1.0, 2, 1)]
    assert held_ranks(1, outside, STARTED, 100.0)[0] == pytest.approx(101.0)
    running = [change(99.0, 5.0, 1, 2)]
    assert held_ranks(1, running, STARTED, 100.0) == (pytest.approx(101.0), [(0.0, 1), (100.0, 2)])


@asynccontextmanager
async def stand_in(step_s: float, slots: int) -> AsyncIterator[str]:
    """Answers /generate, so many requests at a time, with a token each `step_s`."""
    free = asyncio.Semaphore(slots)

    async def generate(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        response = web.StreamResponse()
        await response.prepare(request)
        async with free:
            count = body["sampling_params"]["max_new_tokens"]
            for number in range(1, count + 1):
                await asyncio.sleep(step_s)
                reason = {"type": "length"} if number == count else None
                event = {"output_ids": [7] * number, "meta_info": {"finish_reason": reason}}
                await response.write(f"data: {json.dumps(event)}\n\n".encode())
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_post("/generate", generate)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.process
def test_arrivals_do_not_wait_for_answers_and_waiting_counts() -> None:
    requests = tuple(Request(at=0.05 * n, prompt_tokens=4, output_tokens=4) for n in range(6))
    trace = Trace(name="t", duration_s=0.4, requests=requests)

    async def served() -> tuple[list[StreamRecord], float]:
        async with stand_in(0.05, slots=1) as url:
            played = await play(url, trace)
            return played.records, played.started_at

    records, started = asyncio.run(served())
    assert [r.sent_at - started for r in records] == pytest.approx([r.at for r in requests])
    assert all(r.complete for r in records)
    # A request takes 200 ms and the next one arrives after 50: each waits 150 ms longer than the one before, at least.
    first, last = ttft_s(records[0]), ttft_s(records[-1])
    assert first is not None and last is not None and last >= 0.05 + 5 * 0.15 and last > first


@pytest.mark.process
def test_capacity_is_what_arrives_while_all_slots_are_taken() -> None:
    async def served() -> float:
        async with stand_in(0.02, slots=2) as url:
            begin = asyncio.get_running_loop().time() + 0.3
            records = await closed_loop(url, 3, Request(at=0, prompt_tokens=4, output_tokens=5), 0.3, 1.0)
            return float(tokens_between(records, begin, begin + 1.0))

    # Two at a time, a token each 20 ms at best; the third stream waits.
    assert 20.0 < asyncio.run(served()) <= 102.0


def made(governor: str, attained: int, *operations: Operation, first: int = 1) -> LiveRun:
    """Ten requests a second apart, of which so many get their first token in time."""
    firsts = [n + (0.5 if n < attained else 3.0) for n in range(10)]
    records = [record(n, first_token, first_token + 0.1) for n, first_token in enumerate(firsts)]
    played = Played(records=records, started_at=0.0, started_unix=STARTED, lag_s=0.01)
    decision = Decision(at=STARTED + 3.2, action=Action.GROW, ranks=1, desired=2, because="it must", acted=True)
    idle = Decision(at=STARTED + 4.2, action=Action.NOTHING, ranks=2, desired=2, because="all is well")
    view = PolicyView(settings=PolicySettings(), mode=Autoscale.ON, state="", max_ep_size=2, decisions=[idle, decision])
    trace = Trace(name="burst", duration_s=10.0, requests=())
    return as_run(trace, Governor(governor, first), 0, SLO, played, operations, view, 0.5)


def test_the_report_compares_with_the_largest_size_and_names_what_was_missed() -> None:
    runs = [made("largest fixed", 10, first=2), made("policy", 9, change(3.2, 1.0, 1, 2))]
    assert (runs[1].attained, runs[1].rank_seconds, runs[1].actions) == (9, 16.8, ["3 s: 1 -> 2, because it must"])
    figures = LiveFigures(
        invocation="elasticmoe bench autoscale --live", commit="abc",
        machine={"date": "d", "cpu": "c", "cores": 2, "load_average": [1.5], "versions": {"torch": "2"}},
        model="m", serve="s", slo=str(SLO), prompt="16-64", output="24-72", policy={"drain_s": 3.0}, seed=0,
        capacities=[Capacity(size=n, streams=n, seconds=1.0, tokens_per_s=100.0 * n, itl_s=Quantiles.of([0.1]),
                             load_average=1.0) for n in (1, 2)],
        runs=runs,
    )  # fmt: skip
    report = markdown(figures)
    assert "| burst | 0.900 **missed** | 0.840 **missed** | 1 |" in report
    assert "commit abc" in report and "it must" in report and "2.00" in report
    assert msgspec.json.decode(msgspec.json.encode(figures), type=LiveFigures) == figures
    assert figures.has("burst", "policy", 0) and not figures.has("burst", "policy", 1)


def test_quantiles() -> None:
    assert Quantiles.of([None, 1.0, 3.0, 2.0]) == Quantiles(n=3, p50=2.0, p99=3.0, most=3.0)
    assert Quantiles.of([None]) == Quantiles(n=0)
    assert Quantiles.of([float(n) for n in range(1, 101)]).p99 == 99.0
