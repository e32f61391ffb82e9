"""Workloads: the same for every method, with the rates they promise."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling.workload import Arrival, Lengths, Workload
from elasticmoe_sglang.errors import UserInputError


def until(workload: Workload, end: float) -> list[Arrival]:
    return list(itertools.takewhile(lambda arrival: arrival.due_at < end, workload.arrivals()))


def test_the_same_seed_asks_the_same() -> None:
    assert until(Workload(seed=3), 20) == until(Workload(seed=3), 20)
    assert until(Workload(seed=3), 20) != until(Workload(seed=4), 20)


def test_even_arrivals() -> None:
    times = [arrival.due_at for arrival in until(Workload(rate=4), 5.1)]
    assert times == pytest.approx([i / 4 for i in range(1, 21)])


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
    lines = [(0.5, 3, 2), (0.5, 40, 9), (7.25, 1, 1)]
    text = [json.dumps({"at": at, "prompt_words": words, "output_tokens": tokens}) for at, words, tokens in lines]
    (tmp_path / "trace.jsonl").write_text("\n".join(text) + "\n")
    replayed = list(Workload(trace=tmp_path / "trace.jsonl").arrivals())
    assert [(each.due_at, each.prompt_words, each.output_tokens) for each in replayed] == lines
    assert [len(each.prompt.split()) for each in replayed] == [3, 40, 1]


@pytest.mark.parametrize("line", ["{}", "x", '{"at": 1, "prompt_words": 0, "output_tokens": 2}'])
def test_a_malformed_trace_names_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"at": 1, "prompt_words": 3, "output_tokens": 2}\n' + line + "\n")
    with pytest.raises(UserInputError, match=":2"):
        list(Workload(trace=path).arrivals())
