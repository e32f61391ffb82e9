"""What holds for all tests: one thread for tensor code, a time limit for every test, and a fixture against leaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Before anything imports torch: the machine has two cores, and tests start many processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.helpers.leaks import no_leaks as check_no_leaks

TESTS = Path(__file__).parent

# How long one example takes says how busy the machine is, nothing of the code; whole tests have their limits below.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")

TIME_LIMITS_S = {"unit": 240, "contract": 600, "fault": 600, "e2e": 900, "gpu": 300}
"""Time limit of one test by the folder it lies in; a `timeout` marker on the test overrides it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in TIME_LIMITS_S and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIME_LIMITS_S[folder]))


def pytest_addoption(parser: pytest.Parser) -> None:
    """For the long runs of `make soak`."""
    group = parser.getgroup("long runs")
    group.addoption("--changes", type=int, default=None, help="how many changes a long run makes")
    group.addoption("--seed", type=int, default=None, help="the seed of a long run's dice")


@pytest.fixture
def changes(request: pytest.FixtureRequest) -> int | None:
    """--changes"""
    count: int | None = request.config.getoption("--changes")
    return count


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int | None:
    """--seed"""
    found: int | None = request.config.getoption("--seed")
    return found


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """The test leaves no descriptor, no file in /dev/shm and no child process behind in this process."""
    with check_no_leaks():
        yield
