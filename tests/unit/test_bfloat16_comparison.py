"""The comparison of rounding with and without moves can tell them apart, and does not where there is nothing."""

from __future__ import annotations

import random

import pytest

from tests.helpers.rounding import CHANCE, compare

pytestmark = pytest.mark.process  # computes for seconds


def streams(count: int, seed: int, *, times: float = 1.0, tail: float = 0.0) -> list[list[float]]:
    """Absolute differences of 40 tokens each; a stream has a level of its own, as texts have."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        level = rng.uniform(0.01, 0.03) * times
        made.append([abs(rng.gauss(0, level)) + (0.3 if rng.random() < tail else 0.0) for _ in range(40)])
    return made


def test_the_same_distribution_is_not_told_apart() -> None:
    found = compare(streams(60, 1), streams(64, 2))
    assert found["chance_of_distance"] > CHANCE and found["chance_of_mean"] > CHANCE
    assert (found["moved"]["streams"], found["at_rest"]["tokens"]) == (60, 64 * 40)


@pytest.mark.parametrize("worse", [{"times": 1.5}, {"tail": 0.05}])
def test_more_rounding_after_a_move_is_noticed(worse: dict[str, float]) -> None:
    found = compare(streams(60, 1, **worse), streams(64, 2))
    assert found["chance_of_mean"] < CHANCE and found["mean_larger_by"] > 0
