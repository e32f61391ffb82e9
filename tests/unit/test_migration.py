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
from elasticmoe_patches.worker.migration import MigrationInbox
from elasticmoe_sglang.coordinator.migration import OutputFences

pytestmark = pytest.mark.process


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 5))


def test_requests_go_on_when_all_have_arrived_and_were_released() -> None:
    inbox = MigrationInbox()
    inbox.arrived(2, ("a", None, []))
    inbox.all_sent(2, 2)
    inbox.released.add(2)
    assert inbox.ready() == []
    inbox.arrived(2, ("b", None, []))
    assert inbox.ready() == [2]
    assert [migrated[0] for migrated in inbox.pop(2)[0]] == ["a", "b"]
    assert inbox.ready() == []


def test_what_a_dead_retiring_rank_had_sent_is_dropped_also_when_it_comes_late() -> None:
    """It is sent again from the journal: a request that arrived twice would run twice."""
    inbox = MigrationInbox()
    inbox.arrived(2, ("a", None, []))
    inbox.forget(2)
    inbox.arrived(2, ("b", None, []))
    inbox.all_sent(2, 2)
    inbox.released.add(2)
    assert inbox.held == {} and inbox.ready() == []
    inbox.released.clear()
    inbox.expect([2, 3])  # another worker retires from that rank
    inbox.arrived(2, ("c", None, []))
    inbox.all_sent(2, 1)
    inbox.released.add(2)
    assert inbox.ready() == [2]


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
        assert late.recv_multipart() == [b"", b"3", b"0"]
