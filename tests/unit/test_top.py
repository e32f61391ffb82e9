"""`elasticmoe top`: what it prints once, what it keeps of the events, and how figures become lines."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import msgspec
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from rich.console import Console

from elasticmoe_sglang.api.feed import Event, Feed
from elasticmoe_sglang.api.router import build_router, mount
from elasticmoe_sglang.cli.client import ServerClient
from elasticmoe_sglang.cli.exits import ServerUnreachable
from elasticmoe_sglang.cli.main import main
from elasticmoe_sglang.cli.seen import Seen
from elasticmoe_sglang.cli.top_view import bars, top_view
from elasticmoe_sglang.coordinator.status import Operation
from elasticmoe_sglang.live_figures import LiveFigures
from tests.helpers.fake_cluster import FakeCluster
from tests.unit.test_cli import http_server

pytestmark = pytest.mark.process

POLICY = {
    "mode": "shadow",
    "state": "steady",
    "desired_ranks": 3,
    "decisions": [
        {"at": 3, "action": "nothing", "ranks": 2, "desired": 2, "because": "the SLO holds"},
        {"at": 2, "action": "nothing", "ranks": 2, "desired": 2, "because": "it held before"},
        {"at": 1, "action": "grow", "ranks": 2, "desired": 3, "because": "the queue would wait 2.1 s"},
    ],
}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def served(*, policy: object = None, key: str | None = None) -> Iterator[tuple[int, Clock, LiveFigures]]:
    app, clock = FastAPI(), Clock()
    figures = LiveFigures(clock=clock)
    coordinator = FakeCluster().coordinator()
    mount(app, build_router(coordinator, feed=Feed(coordinator, figures, model="tiny")))
    if policy is not None:
        app.get("/elastic_ep/policy")(lambda: JSONResponse(policy))

    @app.middleware("http")
    async def check(request: Request, call_next) -> Response:  # type: ignore[no-untyped-def]
        if key is not None and request.headers.get("Authorization") != f"Bearer {key}":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        answer: Response = await call_next(request)
        return answer

    with http_server(app) as port:
        yield port, clock, figures


def test_one_snapshot_where_the_output_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with served(policy=POLICY) as (port, clock, figures):
        figures.tokens(321)
        figures.first_token(0.25)
        figures.load(running=5, queued=2)
        clock.now += 1
        assert main(["scale", "3", "--wait", "--port", str(port)]) == 0
        capsys.readouterr()
        assert main(["top", "--port", str(port)]) == 0
    out = capsys.readouterr().out
    assert "tiny" in out and "EP size 3 of 4" in out
    assert "2 -> 3" in out and re.search(r"0.*active", out) and "expert columns" in out
    assert "shadow · steady · desired_ranks 3" in out and "the SLO holds" in out and "it held before" not in out
    assert "grow (2 -> 3): the queue would wait 2.1 s" in " ".join(out.split())


def test_without_a_policy_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with served() as (port, _, _):
        assert main(["top", "--once", "--port", str(port)]) == 0
    assert "policy: not available on this server" in capsys.readouterr().out


def test_refusals_and_silence_end_it(capsys: pytest.CaptureFixture[str]) -> None:
    with served(key="right") as (port, _, _):
        assert main(["top", "--port", str(port), "--admin-key", "wrong"]) == 2
        assert "key" in capsys.readouterr().err
        assert main(["top", "--port", str(port), "--admin-key", "right"]) == 0
    assert main(["top", "--port", str(port)]) == 3
    assert "no server answers" in capsys.readouterr().err


def test_a_server_that_goes_while_it_is_followed() -> None:
    with served() as (port, _, _):
        events = ServerClient(f"http://127.0.0.1:{port}").events()
        assert next(events).status.membership == [0, 1]
        assert next(events).figures == []
        events.close()

    async def half(request: Request) -> Response:
        return Response(b"event: state\ndata: {", headers={"Content-Length": "4000"})

    app = FastAPI()
    app.get("/elastic_ep/events")(half)
    with http_server(app) as port, pytest.raises(ServerUnreachable):
        next(ServerClient(f"http://127.0.0.1:{port}").events())


def event(operations: list[Operation] | msgspec.UnsetType, *seconds: int) -> Event:
    figures = LiveFigures(clock=Clock()).since()
    frame = {
        "instance": "a",
        "model": "m",
        "at": 2000.0,
        "figures": figures,
        "status": {
            "ep_size": 1, "max_ep_size": 2, "epoch": 0, "membership": [0], "target_ranks": [0],
            "placement": [0, 0], "running": None,
            "last": None, "memory": {"available": False, "error": "the HMM did not answer"},
            "ranks": [{"rank": 0, "state": "active", "device": 0}],
        },
    }  # fmt: skip
    frame["figures"] = [
        {"at": at, "tokens": at % 7, "arrived": 0, "ended": 0, "ttft_p50_ms": None, "ttft_p99_ms": None,
         "longest_gap_ms": None, "running": 0, "queued": 0}
        for at in seconds
    ]  # fmt: skip
    found = msgspec.convert(frame, Event)
    return msgspec.structs.replace(found, operations=operations)


def test_figures_of_two_streams_are_not_counted_twice() -> None:
    seen = Seen(lost="gone")
    seen.take(event([], 10, 11, 12))
    seen.take(event(msgspec.UNSET, 11, 12, 13))
    assert [second.at for second in seen.figures] == [10, 11, 12, 13] and seen.lost is None


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, None), (20, 5)])
def test_any_terminal(width: int, height: int | None) -> None:
    seen = Seen()
    seen.take(event([], 1990, 1999))
    seen.lost = "no server answers"
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(top_view(seen, width, height))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    if width == 200:
        assert "not connected: no server answers" in text and "HMM: the HMM did not answer" in text


def test_bars() -> None:
    assert bars([0, 1, 50, 100, None]) == " ▁▄█ "
    assert bars([None, 0]) == "  " and bars([]) == ""
    assert json.dumps(bars([3])) == json.dumps("█")


@contextmanager
def on_port(port: int) -> Iterator[None]:
    """A server on this port whose streams end when it is stopped."""
    ends = threading.Event()
    app, coordinator = FastAPI(), FakeCluster().coordinator()
    mount(app, build_router(coordinator, feed=Feed(coordinator, LiveFigures(), model="tiny", ending=ends.is_set)))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the HTTP server did not start"
            time.sleep(0.01)
        yield
    finally:
        ends.set()
        server.should_exit = True
        thread.join(60)


def test_on_a_terminal_it_follows_through_a_restart() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", "top", "--port", str(port)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "60"}
    drawn = ""

    def wait_for(words: str, without: str = "none of this") -> None:
        nonlocal drawn
        deadline = time.monotonic() + 90
        # The last whole picture: from its first line to the begin of the next one.
        while not any(words in each and without not in each for each in drawn.split("ElasticMoE")[1:-1]):
            assert time.monotonic() < deadline, f"{words!r} was not drawn: {drawn[-2000:]}"
            if select.select([ours], [], [], 1)[0]:
                drawn += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(ours, 65536).decode(errors="replace"))
        drawn = ""

    with ExitStack() as stack:
        stack.callback(os.close, ours)
        with on_port(port):
            process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
            os.close(theirs)
            stack.callback(process.wait, 30)
            stack.callback(process.kill)
            wait_for("EP size 2 of 4")
        wait_for("not connected")
        with on_port(port):
            wait_for("EP size 2 of 4   epoch 0   at", without="not connected")
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
