"""Workloads and schedules: the same for every method, with the rates they promise."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling.schedule import Schedule
from benchmarks.scaling.workload import Arrival, Lengths, Workload, write_trace
from elasticmoe_sglang.errors import UserInputError


def until(workload: Workload, end: float) -> list[Arrival]:
    return list(itertools.takewhile(lambda arrival: arrival.due_at < end, workload.arrivals()))


def test_the_same_seed_asks_the_same() -> None:
    assert until(Workload(seed=3), 20) == until(Workload(seed=3), 20)
    assert until(Workload(seed=3), 20) != until(Workload(seed=4), 20)


def test_even_arrivals() -> None:
    times = [arrival.due_at for arrival in until(Workload(rate=4, even=True), 5.1)]
    assert times == pytest.approx([i / 4 for i in range(1, 21)])


def test_poisson_keeps_its_rate() -> None:
    arrivals = until(Workload(rate=5), 2000)
    assert len(arrivals) == pytest.approx(10_000, rel=0.05)
    gaps = [b.due_at - a.due_at for a, b in itertools.pairwise(arrivals)]
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(2.718**-1, abs=0.02)


def test_a_burst_is_exactly_where_it_was_asked_for() -> None:
    workload = Workload(rate=1, even=True, burst_rate=10, burst_at=10.5, burst_s=5)
    arrivals = until(workload, 30)
    inside = [arrival for arrival in arrivals if 10.5 <= arrival.due_at < 15.5]
    assert len(inside) == pytest.approx(50, abs=1)
    assert len(arrivals) - len(inside) == pytest.approx(25, abs=1)


@given(st.integers(1, 50), st.integers(0, 100), st.sampled_from(["uniform", "lognormal"]), st.integers(0, 9))
def test_lengths_stay_within_their_limits(low: int, more: int, shape: str, seed: int) -> None:
    lengths = Lengths(low=low, high=low + more, shape=shape)
    drawn = [lengths.draw(random.Random(seed)) for _ in range(20)]
    assert all(low <= length <= low + more for length in drawn)


def test_lengths_are_parsed() -> None:
    assert Lengths.parse("32") == Lengths(low=32, high=32)
    assert Lengths.parse("lognormal:8-64") == Lengths(low=8, high=64, shape="lognormal")
    for wrong in ("", "x", "9-3", "0", "normal:1-2"):
        with pytest.raises(UserInputError):
            Lengths.parse(wrong)


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    original = Workload(rate=3, output=Lengths(low=5, high=9))
    write_trace(tmp_path / "trace.jsonl", original, 10)
    replayed = list(Workload(trace=tmp_path / "trace.jsonl").arrivals())
    expected = until(original, 10)
    assert [(r.prompt_words, r.output_tokens) for r in replayed] == [
        (e.prompt_words, e.output_tokens) for e in expected
    ]
    assert [r.due_at for r in replayed] == pytest.approx([e.due_at for e in expected], abs=1e-5)


@pytest.mark.parametrize("line", ["{}", "x", '{"at": 1, "prompt_words": 0, "output_tokens": 2}'])
def test_a_malformed_trace_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 1, "prompt_words": 3, "output_tokens": 2}\n' + line + "\n")
    with pytest.raises(UserInputError, match=":2"):
        list(Workload(trace=path).arrivals())


def test_schedules() -> None:
    schedule = Schedule.parse(2, "30:4,90:2")
    assert (schedule.sizes, schedule.largest) == ([2, 4, 2], 4)
    assert Schedule.parse(3, "").sizes == [3]
    for wrong in ("30", "30:x", "30:4,20:2", "30:2", "30:0"):
        with pytest.raises(UserInputError):
            Schedule.parse(2, wrong)
