"""Requests on their way from retiring ranks: what a dead one had sent is dropped, and others are waited for."""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from elasticmoe_patches.worker import commit
from elasticmoe_patches.worker.inbox import MigrationInbox
from elasticmoe_sglang.coordinator.migration import OutputFences

pytestmark = pytest.mark.process


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 5))


class _Window:
    closed = False

    def close(self) -> None:
        self.closed = True


def window_to_kv() -> Any:
    return _Window()


def test_requests_go_on_when_all_have_arrived_and_were_released() -> None:
    inbox = MigrationInbox()
    inbox.expect("up", [2])
    inbox.arrived("up", 2, ("a", None, []))
    inbox.all_sent("up", 2, 2)
    inbox.release("up", 2)
    assert inbox.take_ready() == []
    inbox.arrived("up", 2, ("b", None, []))
    [(operation_id, rank, retirement)] = inbox.take_ready()
    assert (operation_id, rank) == ("up", 2) and [request for request, *_ in retirement.held] == ["a", "b"]
    assert inbox.take_ready() == []


def test_what_a_dead_retiring_rank_had_sent_is_dropped_also_when_it_comes_late() -> None:
    """It is sent again from the journal: a request that arrived twice would run twice."""
    inbox = MigrationInbox()
    inbox.expect("first", [2])
    inbox.arrived("first", 2, ("a", None, []))
    inbox.forget(2)

    def late() -> None:
        inbox.arrived("first", 2, ("b", None, []))
        inbox.all_sent("first", 2, 1)
        inbox.release("first", 2)

    late()
    assert inbox.take_ready() == []
    inbox.expect("second", [2, 3])  # another worker retires from that rank
    inbox.arrived("second", 2, ("c", None, []))
    inbox.all_sent("second", 2, 1)
    late()
    assert inbox.take_ready() == [], "released by what was said of the dead one"
    inbox.release("second", 2)
    [(operation_id, _, retirement)] = inbox.take_ready()
    assert operation_id == "second" and [request for request, *_ in retirement.held] == ["c"]


def test_what_was_sent_to_an_earlier_worker_of_this_rank_is_dropped() -> None:
    inbox = MigrationInbox()
    inbox.arrived("before", 2, ("a", None, []))
    inbox.all_sent("before", 2, 1)
    inbox.release("before", 2)
    assert inbox.take_ready() == []


def test_a_window_that_is_mapped_before_this_rank_has_committed_is_used() -> None:
    """The retiring rank was faster, and the agent's thread too; without it the KV would be computed again."""
    inbox, window = MigrationInbox(), window_to_kv()
    inbox.map_window("down", 2, window)
    inbox.expect("down", [2])
    inbox.all_sent("down", 2, 0)
    inbox.release("down", 2)
    [(_, _, retirement)] = inbox.take_ready()
    assert retirement.window is window and not window.closed


def test_a_window_of_a_dead_rank_is_closed_whenever_it_was_mapped() -> None:
    inbox, early, late, later = MigrationInbox(), window_to_kv(), window_to_kv(), window_to_kv()
    inbox.expect("down", [2])
    inbox.map_window("down", 2, early)
    inbox.forget(2)
    inbox.map_window("down", 2, late)
    assert early.closed and late.closed
    inbox.expect("again", [2])
    inbox.map_window("again", 2, later)
    assert not later.closed


def test_a_release_waits_for_the_mapping_of_this_retirement() -> None:
    """Not for an earlier one's, which ended with its rank."""
    inbox = MigrationInbox()
    inbox.expect("first", [2])
    inbox.forget(2)
    inbox.map_window("first", 2, None)
    inbox.expect("second", [2])
    mapping = threading.Timer(0.2, inbox.map_window, ("second", 2, None))
    started = time.monotonic()
    mapping.start()
    inbox.await_mapped("second", 2, 5)
    assert time.monotonic() - started >= 0.2
    mapping.join()
    inbox.await_mapped("first", 2, 5)
    assert time.monotonic() - started < 5


def test_fences_are_waited_for_by_operation_and_rank() -> None:
    async def main() -> None:
        fences = OutputFences()
        fences.passed("old", 1)
        fences.passed("new", 0)
        assert not await fences.wait("new", [0, 1], timeout_s=0.02)
        waiting = asyncio.ensure_future(fences.wait("new", [0, 1], timeout_s=2))
        await asyncio.sleep(0.01)
        fences.passed("new", 1)
        assert await waiting
        for number in range(1000):
            fences.passed(str(number), 0)
        assert len(fences._passed) < 100

    run(main())


@pytest.fixture(autouse=True, scope="module")
def _sglang_is_imported() -> None:
    """Which takes seconds, and is not what is timed here."""
    importlib.import_module("elasticmoe_patches.srt.managers.io_struct")


def _leaver(folder: Path, living: bool) -> Any:
    return SimpleNamespace(
        rank=3,
        runtime=SimpleNamespace(paths=SimpleNamespace(peer_endpoint=lambda rank: f"ipc://{folder}/{rank}")),
        region=SimpleNamespace(control=SimpleNamespace(alive=lambda rank: living)),
    )


def test_a_retiring_rank_does_not_wait_for_a_dead_survivor(tmp_path: Path) -> None:
    started = time.monotonic()
    commit._send(_leaver(tmp_path, living=False), "op", {0: [], 1: []})
    assert time.monotonic() - started < commit._LINGER_MS / 2000


def test_a_retiring_rank_waits_until_a_living_survivor_has_what_it_was_sent(tmp_path: Path) -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as late:
        binding = threading.Timer(0.3, late.bind, (f"ipc://{tmp_path}/0",))
        binding.start()
        started = time.monotonic()
        commit._send(_leaver(tmp_path, living=True), "op", {0: []})
        assert time.monotonic() - started >= 0.3
        binding.join()
        assert late.recv_multipart() == [b"", b"op", b"3", b"0"]
