"""Every test says what it needs, and one that is `pure` is held to it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import clock, needs, purity, stopwatch


def item(*marks: pytest.MarkDecorator, folder: str = "unit", name: str = "test_it") -> Any:
    """As much of a collected test as the checks look at."""
    own = [mark.mark for mark in marks]

    def get_closest_marker(wanted: str) -> pytest.Mark | None:
        return next((mark for mark in own if mark.name == wanted), None)

    return SimpleNamespace(
        name=name,
        path=Path("/tests", folder, "test_file.py"),
        iter_markers=lambda: iter(own),
        get_closest_marker=get_closest_marker,
        add_marker=lambda marker: own.append(getattr(pytest.mark, marker).mark),
    )


def test_a_test_has_its_folders_marker_unless_it_says_another() -> None:
    items = [item(), item(pytest.mark.process), item(folder="contract"), item(folder="e2e"), item(pytest.mark.soak)]
    needs.complete(items, Path("/tests"))
    needs.check(items)
    assert [needs.place(each)[0] for each in items] == [0, 1, 1, 3, 0]


def test_none_and_several_are_refused_by_name() -> None:
    with pytest.raises(pytest.UsageError, match=r"test_file.py: none \(test_it\)"):
        needs.check([item(folder="fault")])
    with pytest.raises(pytest.UsageError, match="process and server"):
        needs.check([item(pytest.mark.server, pytest.mark.process)])


def test_tests_of_a_shared_server_are_neighbours() -> None:
    server = pytest.mark.server
    order = [
        item(pytest.mark.process),
        item(pytest.mark.toolchain),
        item(server, pytest.mark.shared("plain")),
        item(server),
        item(server, pytest.mark.shared("steady", "first")),
        item(server, pytest.mark.shared("steady")),
        item(server, pytest.mark.shared("steady", "last")),
        item(server, pytest.mark.shared("faulty")),
    ]
    backwards = list(reversed(order))
    assert sorted(backwards, key=needs.place) == order


@pytest.mark.parametrize("required", ["all", ""])
def test_what_is_missing_fails_where_everything_is_required(monkeypatch: pytest.MonkeyPatch, required: str) -> None:
    monkeypatch.setenv(needs.ENV_REQUIRE, required)
    reports = []
    for each in (item(pytest.mark.toolchain), item(pytest.mark.process, pytest.mark.gpu)):
        longrepr = ("test_file.py", 3, "Skipped: LLVM 19 is not installed")
        report = pytest.TestReport("test_it", ("", 3, ""), {}, "skipped", longrepr, "setup")
        needs.require(each, report)
        reports.append(report)
    assert [report.outcome for report in reports] == ["failed" if required else "skipped", "skipped"]
    assert "LLVM 19 is not installed" in str(reports[0].longrepr)


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run([sys.executable, "-c", ""], check=False),
        lambda: os.system("true"),
        lambda: os.fork() or os._exit(0),
        lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
        lambda: multiprocessing.get_context("forkserver").Process(target=print).start(),
        lambda: multiprocessing.get_context("fork").Process(target=print).start(),
        lambda: importlib.import_module("sglang.srt.server_args"),
    ],
    ids=["subprocess", "system", "fork", "mp spawn", "mp forkserver", "mp fork", "import"],
)
def test_a_pure_test_cannot(start: Callable[[], object]) -> None:
    with pytest.raises(purity.Impure):
        start()
    with pytest.raises(purity.Impure, match="marked `pure`"):
        purity.check_after()
    purity.forget()


def test_a_jumping_clock_waits_for_nothing() -> None:
    import asyncio

    async def main() -> float:
        began = asyncio.get_running_loop().time()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 3600)
        return asyncio.get_running_loop().time() - began

    began = stopwatch.seconds()
    assert 3600 <= clock.run(main()) < 3660
    assert stopwatch.seconds() - began < 60
