"""The stream clients against a server that answers wrongly in every way: nothing may be dropped."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from benchmarks.demo.figures import figures
from benchmarks.demo.scenario import Change, Progress
from benchmarks.demo.settings import Settings
from benchmarks.streams import Ask, Load, StreamClient, StreamRecord, unequal
from elasticmoe_sglang.coordinator.status import Operation, Phase, Timings

pytestmark = pytest.mark.process

ASK = Ask(key="a", prompt="def", tokens=3)
Answer = Callable[[web.StreamResponse], Awaitable[None]]


def event(ids: list[int], finish: str | None = None, **more: object) -> bytes:
    meta = {"finish_reason": None if finish is None else {"type": finish}}
    return b"data: " + json.dumps({"text": "x", "output_ids": ids, "meta_info": meta, **more}).encode() + b"\n\n"


async def stream(answer: Answer, status: int = 200, stall_s: float = 5.0) -> StreamRecord:
    """One request to a server on this machine that answers so."""

    async def generate(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert body["sampling_params"] == {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        await answer(response)
        return response

    app = web.Application()
    app.router.add_post("/generate", generate)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
    try:
        async with StreamClient(f"http://127.0.0.1:{port}", stall_s=stall_s) as client:
            load = Load(client, lambda lane, number: ASK)
            await load.run_once([ASK])
    finally:
        await runner.cleanup()
    (record,) = load.records
    assert record.ended_at is not None
    return record


def writes(*chunks: bytes) -> Answer:
    async def answer(response: web.StreamResponse) -> None:
        for chunk in chunks:
            await response.write(chunk)
            await asyncio.sleep(0.02)

    return answer


def test_a_complete_stream_has_the_arrival_of_every_token() -> None:
    record = asyncio.run(
        stream(writes(event([5]), event([5, 6]), event([5, 6, 7]), event([5, 6, 7], "length"), b"data: [DONE]\n\n"))
    )
    assert record.failure is None and record.complete and not record.lost
    assert record.token_ids == [5, 6, 7]
    assert [gap > 0.01 for _, gap in record.gaps()] == [True, True]


@pytest.mark.parametrize(
    ("answer", "status", "sentence"),
    [
        (writes(event([5]), event([5, 6])), 200, "closed after 2 tokens"),
        (writes(event([5]), event([5, 6], "length")), 200, "ended with 2 of 3 tokens"),
        (writes(event([5]), event([5, 6, 7, 8], "length")), 200, "ended with 4 of 3 tokens"),
        (writes(event([5]), event([9, 6])), 200, "not those that were streamed before"),
        (writes(event([5, 6]), event([5])), 200, "not those that were streamed before"),
        (writes(event([5]), event([5, 6], "abort")), 200, "abort"),
        (writes(event([5]), event([5], None, error={"message": "no room"})), 200, "no room"),
        (writes(b"data: {not json\n\n"), 200, "DecodeError"),
        (writes(b'{"error": "busy"}'), 503, "status 503"),
    ],
)
def test_what_goes_wrong_is_lost_with_a_sentence(answer: Answer, status: int, sentence: str) -> None:
    record = asyncio.run(stream(answer, status))
    assert record.lost and not record.complete
    assert record.failure is not None and sentence in record.failure


def test_a_stream_that_stands_still_is_lost() -> None:
    async def answer(response: web.StreamResponse) -> None:
        await response.write(event([5]))
        await asyncio.sleep(2)

    record = asyncio.run(stream(answer, stall_s=0.2))
    assert record.failure == "no token for 0.2 s after 1 tokens"


def test_a_connection_that_breaks_is_lost() -> None:
    async def answer(response: web.StreamResponse) -> None:
        await response.write(event([5]))
        assert response._req is not None and response._req.transport is not None
        response._req.transport.abort()

    record = asyncio.run(stream(answer))
    assert record.lost and record.failure is not None and "after 1 tokens" in record.failure


def test_nobody_listens() -> None:
    async def refused() -> StreamRecord:
        async with StreamClient("http://127.0.0.1:9") as client:
            load = Load(client, lambda lane, number: ASK)
            await load.run_once([ASK])
        return load.records[0]

    assert asyncio.run(refused()).lost


def record(key: str, ids: list[int], *, tokens: int | None = None, at: float = 0.0, gap: float = 0.1) -> StreamRecord:
    arrivals = [at + gap * (i + 1) for i in range(len(ids))]
    ask = Ask(key=key, prompt="", tokens=len(ids) if tokens is None else tokens)
    return StreamRecord(lane=0, ask=ask, sent_at=at, token_ids=ids, arrivals=arrivals, ended_at=arrivals[-1])


def test_outputs_are_compared_as_far_as_both_go() -> None:
    reference = [record("a", [1, 2, 3, 4])]
    assert unequal([record("a", [1, 2]), record("a", [1, 2, 3, 4])], reference) == []
    assert unequal([record("a", [1, 9])], reference) == ["a: token 1 is 9, expected 2"]
    assert unequal([record("b", [1])], reference) == ["b: nothing to compare with"]


def progress(records: list[StreamRecord], **operation: object) -> Progress:
    base: dict[str, object] = {
        "operation_id": "o", "cause": "target", "phase": Phase.DONE, "message": "", "target": {},
        "old_ep_size": 2, "new_ep_size": 4,
        "ranks_before": [0, 1], "ranks_after": [0, 1, 2, 3], "joining": [2, 3], "retiring": [], "moves": [], "epoch": 1,
        "timings": Timings(planned_ms=1, preparing_ms=90, committing_ms=9, finishing_ms=0, total_ms=100),
        "created_at": 0.0, "columns_planned": 8, "columns_moved": 8, "bytes_moved": 4096, "max_pause_ms": 4.5,
    }  # fmt: skip
    made = Operation(**{**base, **operation})  # type: ignore[arg-type]
    run = Progress(settings=Settings(out=Path("unused"), sizes=(2, 4)), started_at=0.0)
    run.reference = [record("a", list(range(20)))]
    run.records = records
    run.changes = [Change(old=2, new=4, asked_at=11.0, ended_at=11.1, operation=made)]
    return run


def late(seconds: float) -> StreamRecord:
    """A stream whose usual gap of 100 ms is once longer by this."""
    stream = record("a", list(range(20)), at=10.0)
    stream.arrivals = [at + (seconds if at > 11.05 else 0.0) for at in stream.arrivals]
    return stream


def test_figures_of_a_change() -> None:
    result = figures(progress([late(0.399)]), "demo", {})
    (row,) = result.changes
    assert result.passed, result.checks
    assert row.longest_gap_ms == pytest.approx(499) and row.median_gap_ms == pytest.approx(100)
    assert row.gap_limit_ms == pytest.approx(500)
    assert (row.streams, row.lost, row.columns_moved, row.commit_s) == (1, 0, 8, 11.1)
    assert sum(result.tokens_per_s) * result.rate_bin_s == 40


@pytest.mark.parametrize(
    ("failed", "run"),
    [
        ("changes done", lambda: progress([record("a", list(range(20)), at=10.0)], phase=Phase.ROLLED_BACK)),
        ("changes under load", lambda: progress([record("a", list(range(20)), at=20.0)])),
        ("requests lost", lambda: progress([record("a", list(range(19)), tokens=20, at=10.0)])),
        ("streams complete", lambda: progress([record("a", list(range(19)), tokens=20, at=10.0)])),
        ("tokens equal to the reference", lambda: progress([record("a", [7] * 20, at=10.0)])),
        ("pause", lambda: progress([record("a", list(range(20)), at=10.0)], max_pause_ms=50.1)),
        ("pause", lambda: progress([record("a", list(range(20)), at=10.0)], max_pause_ms=None)),
        ("longest gap", lambda: progress([late(0.41)])),
    ],
)
def test_each_check_can_fail(failed: str, run: Callable[[], Progress]) -> None:
    result = figures(run(), "demo", {})
    assert failed in [check.name for check in result.checks if not check.passed]
