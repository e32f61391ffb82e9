"""The simulated server and what decides its size: figures that can be worked out by hand, and no oscillation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.policy.autoscale import SCENARIOS, Figures, compare, make_machine, markdown
from benchmarks.policy.governors import Policy
from benchmarks.policy.service import Machine, Outcome, Scheduled, Server
from benchmarks.policy.traces import KINDS, Request, Trace, make_trace, read_trace, shape
from benchmarks.scaling.costs import H200, assumed
from benchmarks.scaling.simulation import DecodeLoad, Weights
from benchmarks.scaling.workload import Lengths
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.policy.settings import Autoscale, PolicySettings, parse_slo

pytestmark = pytest.mark.process

SLO = parse_slo("ttft=1s,itl=40ms,attainment=0.9")
PROMPT, OUTPUT = Lengths.parse("lognormal:256-8192"), Lengths.parse("lognormal:256-4096")
COSTS = replace(
    H200, memory_rate=assumed(1000.0, "bytes/s"), far_latency_s=assumed(0.0, "test"), near_copy=assumed(1e12, "test"),
    hbm_bytes=assumed(200.0, "test"),
)  # fmt: skip
SMALL = Machine(
    COSTS,
    Weights(columns=4, column_bytes=10, dense_bytes=10),
    DecodeLoad(kv_bytes=1, context=10, exchange_bytes=0, layers=1, max_batch=8),
    prefill_rate=100.0,
    largest=2,
)
"""One rank holds 50 bytes and reads them in 50 ms; each running request adds 10 ms."""


def served(trace: Trace, size: int, plan: tuple[tuple[float, int], ...] = ()) -> tuple[Outcome, Server]:
    server = Server(SMALL, trace, parse_slo("ttft=1s,itl=65ms"), Scheduled(plan), size)
    return server.run(), server


def trace_of(*requests: tuple[float, int, int], duration_s: float = 10.0) -> Trace:
    made = tuple(Request(at=at, prompt_tokens=prompt, output_tokens=output) for at, prompt, output in requests)
    return Trace(name="made", duration_s=duration_s, requests=made)


def test_the_machine_s_numbers() -> None:
    assert SMALL.base_s[1] == pytest.approx(0.05) and SMALL.base_s[2] == pytest.approx(0.03)
    assert SMALL.slope_s(1) == pytest.approx(0.01)
    assert SMALL.slots(1) == 8 and SMALL.smallest() == 1
    # Within 65 ms a rank runs 1.5 requests, and two of them 3.5 each.
    assert SMALL.capacity(1, parse_slo("itl=65ms")) == pytest.approx(1.5 / 0.065)
    assert SMALL.capacity(2, parse_slo("itl=65ms")) == pytest.approx(2 * 3.5 / 0.065)


def test_one_request_takes_its_prefill_and_its_steps() -> None:
    outcome, server = served(trace_of((1.0, 50, 11), duration_s=1.0), 1)
    # Prefill of half a second and one step, then ten tokens of 60 ms.
    assert server.now == pytest.approx(1.0 + 0.5 + 0.05 + 10 * 0.06)
    assert (outcome.attained, outcome.requests) == (1, 1) and server.tokens == pytest.approx(11)


def test_requests_wait_for_the_prefill_of_others() -> None:
    pair = trace_of((1.0, 50, 11), (1.0, 50, 11))
    # The second one's first token comes after 1.1 s on one rank, and at once on two.
    alone, _ = served(pair, 1)
    together, _ = served(pair, 2)
    assert alone.attained < together.attained == 2
    assert (alone.rank_seconds, together.rank_seconds) == (10.0, 20.0)


def test_a_change_takes_its_time_and_joining_ranks_are_paid_for() -> None:
    outcome, _ = served(trace_of((1.0, 10, 2), duration_s=20.0), 1, ((3.0, 2),))
    latency = SMALL.change_s(1, 2)
    assert outcome.sizes == [(0.0, 1), (pytest.approx(3.0 + latency), 2)]
    assert outcome.rank_seconds == 3 * 1 + 17 * 2


@pytest.mark.parametrize("kind", KINDS)
def test_traces_are_the_same_every_time_and_have_their_shape(kind: str) -> None:
    made = make_trace(kind, 5.0, PROMPT, OUTPUT, seed=3)
    assert made == make_trace(kind, 5.0, PROMPT, OUTPUT, seed=3) != make_trace(kind, 5.0, PROMPT, OUTPUT, seed=4)
    rate, duration_s = shape(kind)
    expected = 5.0 * sum(rate(second + 0.5) for second in range(round(duration_s)))
    assert len(made.requests) == pytest.approx(expected, rel=0.1)
    times = [request.at for request in made.requests]
    assert times == sorted(times) and times[-1] < duration_s
    assert max(rate(float(second)) for second in range(round(duration_s))) <= 1.0


def test_a_trace_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "load.jsonl"
    path.write_text(json.dumps({"at": 1.5, "prompt_words": 7, "output_tokens": 9}) + "\n")
    assert read_trace(path) == Trace(
        name="load", duration_s=1.5, requests=(Request(at=1.5, prompt_tokens=7, output_tokens=9),)
    )
    path.write_text("{}\n")
    with pytest.raises(UserInputError, match="no request of a trace"):
        read_trace(path)


def settled_changes(rate: float, size: int, seed: int) -> list[tuple[float, int]]:
    """What the policy changes in ten minutes of a steady load, after it had some to settle."""
    machine = make_machine(SCENARIOS["qwen3-30b-a3b-8"])
    made = make_trace("steady", 2 * rate, PROMPT, OUTPUT, seed=seed)  # which is half of its peak
    requests = tuple(request for request in made.requests if request.at < 900.0)
    trace = Trace(name="steady", duration_s=900.0, requests=requests)
    policy = Policy(PolicySettings(slo=str(SLO), autoscale=Autoscale.ON), machine.largest)
    outcome = Server(machine, trace, SLO, policy, size).run()
    assert outcome.attainment > 0.95
    return [(at, new) for at, new in outcome.sizes if 270.0 <= at <= 870.0]


@pytest.mark.parametrize(("rate", "size"), [(0.8, 2), (6.0, 4), (12.0, 5), (19.0, 8)])
def test_a_steady_load_is_left_alone(rate: float, size: int) -> None:
    """Poisson arrivals, and lengths that differ by a factor of 16."""
    assert [settled_changes(rate, size, seed) for seed in range(3)] == [[], [], []]


def test_a_load_at_a_size_s_limit_makes_it_grow_once_and_stay() -> None:
    found = [settled_changes(1.5, 2, seed) for seed in range(3)]
    assert all(len(changes) <= 1 for changes in found), found


def test_the_comparison_and_its_report() -> None:
    machine = make_machine(SCENARIOS["qwen3-30b-a3b-2"])
    made = make_trace("burst", 7.0, PROMPT, OUTPUT)
    trace = Trace(name="burst", duration_s=400.0, requests=tuple(r for r in made.requests if r.at < 400.0))
    result = compare("qwen3-30b-a3b-2", machine, trace, SLO)
    runs = {run.name: run for run in result.runs}
    assert list(runs) == ["smallest fixed", "largest fixed", "policy", "policy without forecast", "oracle"]
    assert runs["smallest fixed"].rank_seconds == 400.0 and runs["largest fixed"].rank_seconds == 800.0
    assert runs["smallest fixed"].attainment < runs["policy"].attainment
    assert runs["policy"].rank_seconds < runs["largest fixed"].rank_seconds
    assert runs["oracle"].attainment >= runs["policy"].attainment
    assert result.actions and "because" in result.actions[0]
    report = markdown(
        Figures(simulation=True, invocation="x", slo=str(SLO), prompt="p", output="o", seed=0, results=[result])
    )
    assert report.startswith("# SIMULATION") and f"{runs['policy'].attainment:.1%}" in report
