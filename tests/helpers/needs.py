"""What a test needs: every test has exactly one of these markers, tests run in their order, and CI lacks nothing.

A test that says nothing has the marker of its folder. `pure` is checked while the test runs
(tests/helpers/purity.py), so a test in tests/unit that starts a process has to say so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

NEEDS = ("pure", "process", "toolchain", "server")
"""In the order in which they run: the cheap ones first, and SGLang is not imported before `pure` tests are done."""
DEFAULTS = {"unit": "pure", "contract": "process", "e2e": "server", "gpu": "process"}
"""By folder of tests/. In tests/fault a file says what its tests need."""
OWN = ""
SHARED = ("plain", OWN, "steady", "faulty", "site")
"""Servers that several files share (tests/helpers/shared.py), in the order in which their tests run; OWN: tests with
servers of their own. The plain one comes first: it gives the references that those ask for, and ends with that."""
_WITHIN = ("first", "", "last")
ENV_REQUIRE = "ELASTICMOE_REQUIRE"
"""`all`: what is missing on this machine fails a test instead of skipping it. Only GPUs may be missing."""


def complete(items: Sequence[pytest.Item], tests: Path) -> None:
    """Gives the tests without a marker that of their folder."""
    for item in items:
        folder = item.path.relative_to(tests).parts[0]
        if folder in DEFAULTS and not _needs(item):
            item.add_marker(DEFAULTS[folder])


def check(items: Sequence[pytest.Item]) -> None:
    """Raises pytest.UsageError naming the tests that have none or several of the markers."""
    wrong: dict[str, str] = {}
    for item in items:
        found = sorted(_needs(item))
        if len(found) != 1:
            wrong.setdefault(f"{item.path.name}: {' and '.join(found) or 'none'}", item.name)
    if wrong:
        lines = [f"{what} ({name})" for what, name in wrong.items()]
        raise pytest.UsageError(f"a test needs exactly one of the markers {', '.join(NEEDS)}:\n" + "\n".join(lines))


def place(item: pytest.Item) -> tuple[int, int, int]:
    """Where in the run the test comes; among equals the order is the collected one."""
    [need] = _needs(item)
    shared = item.get_closest_marker("shared")
    name, within = ((*shared.args, "") if shared is not None else (OWN, ""))[:2]
    return NEEDS.index(need), SHARED.index(name), _WITHIN.index(within)


def require(item: pytest.Item, report: pytest.TestReport) -> None:
    """Turns the skip of a test that needs no GPU into a failure where ELASTICMOE_REQUIRE is `all`."""
    if os.environ.get(ENV_REQUIRE) != "all" or not report.skipped or hasattr(report, "wasxfail"):
        return
    if any(item.get_closest_marker(name) for name in ("gpu", "nvlink")):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{ENV_REQUIRE}=all, and this test was to be skipped: {reason}"


def _needs(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers() if mark.name in NEEDS}
