"""Stopping a server, without one: what the main process does between the signal and the end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from elasticmoe_patches import services as services_module
from elasticmoe_patches.services import Services
from elasticmoe_patches.srt.entrypoints.http_server import start_tokenizer, start_with_server
from elasticmoe_patches.srt.managers import tokenizer_manager as hooks
from elasticmoe_patches.srt.utils.common import before_kill_process_tree
from elasticmoe_sglang.config import ElasticConfig

pytestmark = pytest.mark.process


class Tokenizer:
    """As much of SGLang's as the hooks touch."""

    def __init__(self) -> None:
        self.gracefully_exit = False
        self.rid_to_state: dict[str, object] = {}
        self.server_status = "Up"
        self.event_loop: Any = None
        self.aborted = False
        self.loops = 0

    def abort_request(self, *, abort_all: bool) -> None:
        self.aborted = abort_all

    def auto_create_handle_loop(self) -> None:
        self.loops += 1
        self.event_loop = asyncio.get_running_loop()


def make_services(closing: concurrent.futures.Future[None] | None) -> Services:
    """Services that have started nothing."""
    services = object.__new__(Services)
    services.runtime = SimpleNamespace(config=ElasticConfig(ep_size=1, max_ep_size=2, commit_deadline_s=0.2))  # type: ignore[assignment]
    services._coordinator = services._tokenizer = None
    services._closing = closing
    services._ends = services._stopped = False
    services._lifeline = SimpleNamespace(cut=lambda: killed.append("all"))  # type: ignore[assignment]
    return services


killed: list[str] = []


@pytest.fixture(autouse=True)
def services(monkeypatch: pytest.MonkeyPatch) -> Services:
    killed.clear()
    made = make_services(None)
    monkeypatch.setattr(services_module, "_services", made)
    return made


def test_requests_are_waited_for_and_then_sglang_goes_on_at_once(services: Services) -> None:
    async def run() -> list[str]:
        tokenizer, seen = Tokenizer(), []

        async def original(_self: Tokenizer) -> None:
            seen.append(f"requests {len(tokenizer.rid_to_state)}, ending {services.ending()}")

        task = asyncio.create_task(hooks.around_sigterm_watchdog(original, tokenizer))
        tokenizer.rid_to_state["a"] = SimpleNamespace(dispatched=True)
        await asyncio.sleep(0.3)
        hooks.stop(tokenizer)
        await asyncio.sleep(0.3)
        seen.append("draining" if not services.ending() else "ending")
        tokenizer.rid_to_state.clear()
        await asyncio.wait_for(task, 1)
        return seen

    assert asyncio.run(run()) == ["draining", "requests 0, ending True"]


def test_what_was_never_sent_is_not_waited_for_long(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang leaves an entry behind for each further sample (`n`) of a request; its own loop would never end."""
    monkeypatch.setattr(hooks, "_TOKENISED_S", 0.2)

    async def run() -> int:
        tokenizer, seen = Tokenizer(), []

        async def original(_self: Tokenizer) -> None:
            seen.append(len(tokenizer.rid_to_state))

        tokenizer.rid_to_state["a_1"] = SimpleNamespace(dispatched=False)
        hooks.stop(tokenizer)
        await asyncio.wait_for(hooks.around_sigterm_watchdog(original, tokenizer), 2)
        return seen[0]

    assert asyncio.run(run()) == 0


def test_a_second_interrupt_aborts_what_runs() -> None:
    tokenizer = Tokenizer()
    hooks.stop(tokenizer)
    assert tokenizer.gracefully_exit and not tokenizer.aborted
    hooks.stop(tokenizer)
    assert tokenizer.aborted


def test_sigint_is_handled_from_the_start_of_the_loop() -> None:
    async def run() -> bool:
        tokenizer = Tokenizer()
        start_tokenizer(tokenizer)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.1)
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        return tokenizer.gracefully_exit

    assert asyncio.run(run())


def test_the_loop_starts_with_the_server_and_not_with_its_first_request() -> None:
    app, tokenizer = FastAPI(), Tokenizer()
    start_with_server(app, tokenizer.auto_create_handle_loop)
    with TestClient(app):
        assert tokenizer.loops == 1


@pytest.mark.parametrize(("left", "waited"), [([], 0), (["b"], 1)])
def test_a_request_that_was_answered_is_not_waited_for(left: list[str], waited: int) -> None:
    tokenizer, waits = Tokenizer(), []
    tokenizer.rid_to_state = dict.fromkeys(left, object())

    def original(_self: Tokenizer, _obj: object) -> Any:
        async def abort() -> None:
            waits.append("two seconds")

        return abort

    obj = SimpleNamespace(is_single=False, rid=["a", "b"])
    asyncio.run(hooks.around_create_abort_task(original, tokenizer, obj)())
    assert len(waits) == waited


def test_a_change_that_does_not_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    services = make_services(concurrent.futures.Future())
    asyncio.run(services.begin_to_end())
    assert services.ending() and killed == ["all"]
    services = make_services(done := concurrent.futures.Future())
    done.set_result(None)
    asyncio.run(services.begin_to_end())
    assert services.ending() and killed == ["all"]


def test_the_end_of_a_process_of_sglang_ends_the_server(
    services: Services, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: SGLang's own handler of a crash looks at the processes with py-spy first, for more than a minute."""
    ended: list[int] = []
    monkeypatch.setattr("sglang.srt.utils.kill_process_tree", ended.append)
    services.loop = asyncio.new_event_loop()
    thread = threading.Thread(target=services.loop.run_forever)
    thread.start()
    child = subprocess.Popen(["sleep", "60"])
    try:
        services.watch(SimpleNamespace(_processes=[SimpleNamespace(pid=child.pid)], _names=["scheduler_0"]))
        time.sleep(0.2)
        assert not ended
        child.kill()
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        services.loop.call_soon_threadsafe(services.loop.stop)
        thread.join(10)
        services.loop.close()
        child.wait()
    assert ended == [os.getpid()]
    assert f"SGLang's data-parallel controller (pid {child.pid}) has ended; the server ends" in caplog.text


def test_a_stopped_process_runs_what_is_registered_and_leaves() -> None:
    program = """
import asyncio, atexit
from tests.unit.test_stopping import make_services
services = make_services(None)
atexit.register(print, "registered")
services.ends()
services.leave()
asyncio.run(services.begin_to_end())
services.leave()
print("still here")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "registered\n"), done.stderr


def test_the_coordinator_knows_when_sglang_kills_its_own_tree(services: Services) -> None:
    before_kill_process_tree(os.getpid() + 1)
    assert not services.ending()
    before_kill_process_tree(os.getpid(), include_parent=False)
    assert services.ending()
