"""What holds for all tests: what each of them needs, in which order they run, time limits, and fixtures for all."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

# Before anything imports torch: the machine has two cores, and tests start many processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.helpers import needs, purity, stopwatch
from tests.helpers.leaks import no_leaks as check_no_leaks

if TYPE_CHECKING:
    from tests.e2e.conftest import Corpora  # need more than every venv that runs tests has
    from tests.helpers.shared import Shared

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
    needs.complete(items, TESTS)
    needs.check(items)
    items.sort(key=needs.place)


def pytest_sessionfinish(session: pytest.Session) -> None:
    limit_s: float | None = session.config.getoption("--at-most")
    if limit_s is not None and stopwatch.seconds() > limit_s and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    limit_s: float | None = config.getoption("--at-most")
    if limit_s is not None:
        verdict = "FAILED: too long" if stopwatch.seconds() > limit_s else "ok"
        terminalreporter.write_line(
            f"{verdict}: {stopwatch.seconds():.0f} s of at most {limit_s:.0f} s, "
            f"without {stopwatch.queued_s():.0f} s in which other programs had the processor"
        )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked `pure` is held to it, in its fixtures of all scopes too."""
    with purity.watched(item.get_closest_marker("pure") is not None):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    purity.check_before()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown() -> Generator[None, object, object]:
    outcome = yield
    purity.check_after()
    return outcome


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    needs.require(item, report)
    if report.failed:
        purity.forget()  # it has been said
    return report


def pytest_addoption(parser: pytest.Parser) -> None:
    """For `make quick`, and for the long runs of `make soak`."""
    parser.addoption("--at-most", type=float, default=None, metavar="SECONDS", help="fail when the run takes longer")
    group = parser.getgroup("long runs")
    group.addoption("--changes", type=int, default=None, help="how many changes a long run makes")
    group.addoption("--kills", type=int, default=None, help="how many kills a long run makes")
    group.addoption("--seed", type=int, default=None, help="the seed of a long run's dice")


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_is_no_garbage() -> None:
    """What other files have imported, SGLang above all: a test that collects garbage need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def changes(request: pytest.FixtureRequest) -> int | None:
    """--changes"""
    count: int | None = request.config.getoption("--changes")
    return count


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int | None:
    """--kills"""
    count: int | None = request.config.getoption("--kills")
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


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Servers that tests of several files share; mark such a test `shared` with the server's name."""
    from tests.helpers.shared import Shared

    servers = Shared(tmp_path_factory.mktemp)
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def corpora(shared: Shared) -> Corpora:
    """Prompts with plain SGLang's answers to them."""
    from tests.e2e.conftest import Corpora

    return Corpora(shared)
