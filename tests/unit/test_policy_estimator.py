"""The estimator, the capacity that it learns, and the forecast, against loads whose figures are known."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.policy.capacity import CapacityLearner, rank_capacity
from elasticmoe_sglang.policy.estimator import Estimator, Sample, Snapshot
from elasticmoe_sglang.policy.forecast import BIN_S, DemandHistory, find_period
from elasticmoe_sglang.policy.meter import RequestMeter
from elasticmoe_sglang.policy.settings import PolicySettings, parse_slo
from elasticmoe_sglang.policy.windows import Buckets, Durations

SLO = "ttft=1s,itl=50ms,attainment=0.9"
SETTINGS = PolicySettings(slo=SLO)


def estimator() -> Estimator:
    return Estimator(parse_slo(SLO))


def look(made: Estimator, now: float) -> Snapshot:
    snapshot = made.snapshot(now, SETTINGS)
    assert snapshot is not None
    return snapshot


def serve(made: Estimator, rid: str, at: float, ttft: float, itl: float, tokens: int, *, streams: bool = True) -> None:
    made.arrived(at, rid, 100, streams)
    made.first_token(at + ttft, rid)
    made.produced(at + ttft + itl * (tokens - 1), tokens)
    made.ended(at + ttft + itl * (tokens - 1), rid, tokens)


def test_nothing_is_known_before_the_first_sample() -> None:
    assert estimator().snapshot(5.0, SETTINGS) is None


def test_rates_lengths_and_attainment_of_a_known_load() -> None:
    made = estimator()
    for number in range(400):
        late = number % 10 == 0
        serve(made, str(number), number / 10, ttft=1.5 if late else 0.25, itl=0.02, tokens=21)
    made.sampled(40.0, Sample(ranks=2, running=7, waiting=3, kv_use=0.5, slots=8))
    found = look(made, 40.0)
    assert (found.ranks, found.running, found.waiting, found.slots, found.kv_use) == (2, 7, 3, 8, 0.5)
    assert found.arrivals_fast == pytest.approx(10.0) and found.arrivals_slow == pytest.approx(10.0)
    assert (found.output_tokens, found.prompt_tokens) == (pytest.approx(21), pytest.approx(100))
    assert found.output_spread == pytest.approx(0.0, abs=1e-6)
    assert found.attainment == pytest.approx(0.9, abs=0.01)
    assert found.first_late / (found.first_ok + found.first_late) == pytest.approx(0.1, abs=0.02)
    assert found.pace_late == 0 and found.pace_ok > 0
    assert found.goodput_tokens_per_s == pytest.approx(0.9 * 10 * 21, rel=0.05)
    ttft, itl = made.latencies(40.0)
    assert ttft.p50 == pytest.approx(0.25, rel=0.05) and ttft.p99 == pytest.approx(1.5, rel=0.05)
    assert itl.p90 == pytest.approx(0.02, rel=0.05)


def test_a_request_that_waits_too_long_is_late_before_its_token_comes_and_counts_once() -> None:
    made = estimator()
    made.sampled(0.0, Sample(ranks=1, running=0, waiting=1))
    made.arrived(0.5, "a", 10)
    assert look(made, 1.4).first_late == 0
    made.snapshot(2.0, SETTINGS)
    assert look(made, 3.0).first_late == 1
    made.first_token(3.5, "a")
    made.ended(4.0, "a", 3)
    found = look(made, 5.0)
    assert (found.first_late, found.first_ok, found.attainment) == (1, 0, 0.0)


def test_who_does_not_stream_is_judged_by_the_whole_time() -> None:
    made = estimator()
    made.sampled(0.0, Sample(ranks=1, running=0, waiting=0))
    for rid, took in (("fast", 1.9), ("slow", 2.1)):  # a second, and 50 ms for each of 20 further tokens
        made.arrived(1.0, rid, 10, streams=False)
        made.ended(1.0 + took, rid, 21)
    found = look(made, 5.0)
    assert (found.pace_ok, found.pace_late, found.first_late, found.attainment) == (1, 1, 0, 0.5)


def test_aborted_requests_are_not_judged() -> None:
    made = estimator()
    made.sampled(0.0, Sample(ranks=1, running=0, waiting=0))
    made.arrived(0.0, "a", 10)
    made.aborted(0.5, "a")
    made.ended(0.6, "a", 5)
    found = look(made, 5.0)
    assert (found.attainment, found.first_late, found.output_tokens) == (None, 0, 0.0)


def test_after_a_mark_only_later_arrivals_count() -> None:
    made = estimator()
    made.sampled(0.0, Sample(ranks=1, running=0, waiting=0))
    serve(made, "before", 0.0, ttft=2.0, itl=0.1, tokens=10)
    made.arrived(3.0, "open", 10)
    made.mark(4.0)
    made.first_token(5.5, "open")
    serve(made, "after", 6.0, ttft=0.1, itl=0.01, tokens=10)
    found = look(made, 10.0)
    assert (found.first_ok, found.first_late, found.pace_ok, found.pace_late) == (1, 0, 1, 0)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(1e-4, 100)), min_size=1, max_size=60))
def test_quantiles_are_those_of_the_values(values: list[tuple[float, float]]) -> None:
    buckets = Buckets(61)
    for at, seconds in sorted(values):
        buckets.at(at).ttft.add(seconds)
    found = Durations.quantiles((bucket.ttft for bucket in buckets.last(60, 60.0)), (0.5, 0.99))
    ordered = sorted(seconds for _, seconds in values)
    for share, quantile in zip((0.5, 0.99), found, strict=True):
        assert quantile is not None
        assert quantile == pytest.approx(ordered[math.ceil(share * len(ordered)) - 1], rel=0.1)


def test_a_window_forgets() -> None:
    buckets = Buckets(10)
    buckets.at(0.5).arrivals += 1
    assert sum(bucket.arrivals for bucket in buckets.last(9, 5.0)) == 1
    assert sum(bucket.arrivals for bucket in buckets.last(9, 9.5)) == 1
    assert sum(bucket.arrivals for bucket in buckets.last(9, 30.0)) == 0
    buckets.at(25.0).arrivals += 1  # late, but within what is kept
    assert sum(bucket.arrivals for bucket in buckets.last(9, 30.0)) == 1


def test_capacity_is_learned_from_itl_and_limited_by_slots_kv_and_slo() -> None:
    learner, rng = CapacityLearner(), random.Random(1)
    for _ in range(200):
        running = rng.uniform(5, 15)
        itl = 0.01 + 0.001 * running
        learner.learn(ranks=2, running=2 * running, tokens_per_s=2 * running / itl, kv_use=running / 50, full=False)
    models = learner.models()
    assert models[2].base_s == pytest.approx(0.01, rel=0.1) and models[2].slope_s == pytest.approx(0.001, rel=0.1)

    def capacity(itl_limit_s: float | None, slots: int | None) -> tuple[float, float | None]:
        found = rank_capacity(models, 3, itl_limit_s=itl_limit_s, slots=slots)
        assert found is not None
        return found.tokens_per_s, found.running

    rate, running = capacity(0.03, None)
    assert running == pytest.approx((0.9 * 0.03 - 0.01) / 0.001, rel=0.15)
    assert rate == pytest.approx(running / (0.9 * 0.03), rel=0.05)
    assert capacity(0.03, 8)[1] == 8.0
    assert capacity(None, 1000)[1] == pytest.approx(0.95 * 50, rel=0.05)
    assert rank_capacity({}, 3, itl_limit_s=0.03, slots=8) is None


@pytest.mark.parametrize(("waiting", "growth", "known"), [(4, 0, True), (1, 0, False), (4, 5, False)])
def test_ranks_are_full_when_queues_stay_and_batches_do_not_grow(waiting: int, growth: int, known: bool) -> None:
    made = estimator()
    for second in range(20):
        made.produced(second + 0.5, 600)
        running = 40 + growth * second
        made.sampled(second + 1.0, Sample(ranks=2, running=running, waiting=waiting, slots=200))
    [model] = look(made, 21.0).models.values()
    assert model.full_tokens_per_s == (pytest.approx(300.0) if known else None)


def test_a_full_rank_s_rate_is_its_capacity() -> None:
    learner = CapacityLearner()
    for _ in range(10):
        learner.learn(ranks=1, running=20, tokens_per_s=300.0, kv_use=None, full=True)
    found = rank_capacity(learner.models(), 1, itl_limit_s=1.0, slots=100)
    assert found is not None and found.tokens_per_s == pytest.approx(300.0)


def load(history: DemandHistory, seconds: int, rate: float | list[float], seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for second in range(seconds):
        now = rate if isinstance(rate, float) else rate[second]
        for _ in range(rng.poisson(now)):
            history.add(second + 0.5, 100.0)


def test_a_steady_load_promises_nothing() -> None:
    for seed in range(5):
        history = DemandHistory()
        load(history, 1800, 20.0, seed)
        expected = history.expected(1800.0, 10.0)
        assert expected is None or expected.tokens_per_s < 20 * 100 * 1.15, f"seed {seed}: {expected}"


def test_a_rising_load_goes_on_rising() -> None:
    history = DemandHistory()
    load(history, 300, [10 + second / 10 for second in range(300)])
    expected = history.expected(300.0, 20.0)
    assert expected is not None and "rises" in expected.because
    assert expected.tokens_per_s == pytest.approx(42 * 100, rel=0.15)


def test_a_load_that_repeats_is_expected_again() -> None:
    period = 400
    rates = [10 + 30 * (second % period >= 300) for second in range(4 * period)]
    history = DemandHistory()
    load(history, 4 * period - 110, [float(rate) for rate in rates])
    expected = history.expected(4 * period - 110.0, 20.0)
    assert expected is not None and expected.because == "the load repeats every 400 s"
    assert expected.tokens_per_s > 20 * 100


@given(st.integers(15, 60), st.integers(0, 100))
def test_a_period_is_found_in_noise(bins: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    wave = 100 + 50 * np.sin(2 * np.pi * np.arange(4 * bins) / bins) + rng.normal(0, 8, 4 * bins)
    assert find_period(wave) == pytest.approx(bins, abs=max(1, bins // 10))
    assert find_period(rng.normal(100, 10, 3)) is None and find_period(np.zeros(200)) is None


def test_a_gap_longer_than_the_history_leaves_nothing() -> None:
    history = DemandHistory()
    history.add(1.0, 5.0)
    assert history.expected(BIN_S * 40000, 10.0) is None


def test_the_meter_hands_on_what_happened() -> None:
    meter, made = RequestMeter(), estimator()
    meter.arrived(1.0, "a", 50, True)
    meter.arrived(1.1, "b", 50, False)
    meter.arrived(1.2, "c", 50, True)
    meter.output(1.5, ["a", "b"], [[1], [1, 2]], [1, 2], [None, None])
    meter.output(2.5, ["a", "b", "x"], [[2], [3], [4]], [2, 3, 1], [{"type": "stop"}, {"type": "abort"}, None])
    meter.aborted(2.6, "c")
    made.sampled(2.7, Sample(ranks=1, running=0, waiting=0))
    meter.drain(2.8, made)
    meter.drain(2.9, made)
    found = look(made, 4.0)
    assert found.tokens_per_s * min(10.0, 3.0) == pytest.approx(6)
    assert (found.attainment, found.output_tokens, found.first_ok, found.first_late) == (0.0, 2.0, 1, 0)
    assert found.pace_late == 1, "a second between two tokens is beyond 50 ms"
