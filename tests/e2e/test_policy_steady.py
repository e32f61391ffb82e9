"""Ten minutes of steady load with autoscaling on: once it has settled, the size stays. For `make soak`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.policy.live import EXPERTS, HIDDEN, LAYERS
from benchmarks.policy.live_report import Quantiles
from benchmarks.policy.player import closed_loop, held_ranks, itl_s, met, play, tokens_between, ttft_s
from benchmarks.policy.traces import Excerpt, Request, make_trace
from benchmarks.scaling.workload import Lengths
from elasticmoe_sglang.coordinator.status import Operation
from elasticmoe_sglang.policy.settings import parse_slo
from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.record import record

pytestmark = [pytest.mark.server, pytest.mark.soak, pytest.mark.timeout(1200)]

SETTLE_S, STEADY_S = 60.0, 600.0
SLO = parse_slo("ttft=1s,itl=200ms,attainment=0.9")
PROMPT, OUTPUT = Lengths.parse("16-64"), Lengths.parse("24-72")
STREAMS, WARM_S, MEASURE_S = 32, 4.0, 8.0


def test_a_steady_load_is_left_alone(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", hidden=HIDDEN, layers=LAYERS, experts=EXPERTS)
    args = ["--elasticmoe-cpu-bind", "auto", "--max-running-requests", str(STREAMS)]
    with ElasticServer(model, args, log=tmp_path / "server.log", capacity=2, kv_tokens=16384) as server:
        capacity = asyncio.run(closed_tokens_per_s(server.url))
        response = server.post("/elastic_ep/policy", {"slo": str(SLO), "autoscale": "on"})
        assert response.status_code == 200, response.text
        # The steady load is half of its peak, which is what both ranks together can do.
        excerpt = Excerpt(faster=1.0, duration_s=SETTLE_S + STEADY_S)
        trace = make_trace("steady", capacity / 48, PROMPT, OUTPUT, excerpt=excerpt)
        played = asyncio.run(play(server.url, trace))
        operations = server.operations()
        view: dict[str, Any] = server.get("/elastic_ep/policy?limit=1000").json()
    changes = [operation["created_at"] - played.started_unix for operation in operations]
    late = [round(at, 1) for at in changes if SETTLE_S <= at <= SETTLE_S + STEADY_S]
    attained = sum(met(each, SLO) for each in played.records)
    rank_seconds, sizes = held_ranks(
        2, msgspec.convert(operations, list[Operation]), played.started_unix, trace.duration_s
    )
    record(
        "autoscale-steady",
        f"{len(os.sched_getaffinity(0))} cores",
        {
            "seconds": STEADY_S, "settling_s": SETTLE_S, "changes": len(late), "changes_at": late, "sizes": sizes,
            "capacity_tokens_per_s": capacity, "requests": len(played.records), "attained": attained,
            "incomplete": sum(not each.complete for each in played.records), "slo": str(SLO),
            "ttft_p99_s": Quantiles.of([ttft_s(each) for each in played.records]).p99,
            "itl_p99_s": Quantiles.of([itl_s(each) for each in played.records]).p99,
            "rank_seconds": round(rank_seconds, 1), "client_lag_s": round(played.lag_s, 3),
        },
    )  # fmt: skip
    assert all(each.complete for each in played.records)
    # Where the largest size is too small, the size stays without anybody's doing.
    assert attained >= SLO.attainment * len(played.records), "the machine is too slow, or busy"
    acted = [decision["because"] for decision in view["decisions"] if decision["acted"]]
    assert not late, acted


async def closed_tokens_per_s(url: str) -> float:
    """Of both ranks, with all of their slots taken."""
    loop = asyncio.get_running_loop()
    begin = loop.time() + WARM_S
    request = Request(at=0.0, prompt_tokens=40, output_tokens=48)
    records = await closed_loop(url, STREAMS, request, WARM_S, MEASURE_S)
    return tokens_between(records, begin, begin + MEASURE_S) / MEASURE_S
