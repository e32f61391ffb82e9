"""Changes that fail before their commit: serving is untouched, the operation says why, and the next change works.

One server for all cases, with streams running. Its devices have room for twelve of sixteen expert columns beside the
dense weights, so EP size 1 does not fit. Every test run has one case of each sort: a size that does not fit, a joining
rank that is killed, memory that runs out; the others are for `make soak`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from elasticmoe_sglang.hmm.client import HmmClient
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import arm, armed
from tests.helpers.load import Pump, Stream, settled
from tests.helpers.shared import FAULTY_TOKENS, Faulty, Shared, faulty_server, standby_pid

pytestmark = [pytest.mark.server, pytest.mark.shared("faulty"), pytest.mark.timeout(300)]

STREAMS = 4
PREPARE_DEADLINE_S = 15.0
COMMIT_DEADLINE_S = 3.0


@pytest.fixture
def bench(shared: Shared) -> Faulty:
    return shared.faulty()


@pytest.fixture(scope="module")
def impatient(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """The same with short deadlines, for what comes late."""
    shared.close()
    prepare = ("--elasticmoe-prepare-deadline", str(PREPARE_DEADLINE_S))
    commit = ("--elasticmoe-commit-deadline", str(COMMIT_DEADLINE_S))
    with faulty_server(tmp_path_factory.mktemp("impatient"), (*prepare, *commit)) as bench:
        yield bench


def snapshot(server: ElasticServer) -> dict[str, Any]:
    """What a failed change must leave as it was."""
    status = server.status()
    active = [(rank["rank"], rank["pid"]) for rank in status["ranks"] if rank["state"] == "active"]
    ledger = [(device["used"], device["by_kind"]) for device in status["memory"]["devices"]]
    return {name: status[name] for name in ("membership", "epoch", "placement")} | {
        "active": active,
        "ledger": ledger,
        "busy": [rank["state"] for rank in status["ranks"] if rank["state"] in ("joining", "retiring")],
    }


@contextmanager
def untouched(bench: Faulty) -> Iterator[list[Stream]]:
    """Streams run before, during and after the block, complete and right; and all is as before."""
    before = snapshot(bench.server)
    with Pump(bench.load, bench.request, STREAMS) as pump:
        settled(lambda: len(pump.streams) >= STREAMS, 10, "streams start")
        for stream in pump.streams[:STREAMS]:
            stream.wait_for_tokens(4, 60)
        yield pump.streams
        running = [stream for stream in pump.streams if not stream.done.done()]
        for stream, tokens in [(stream, len(stream.ids)) for stream in running]:
            stream.wait_for_tokens(min(tokens + 3, stream.wanted), 30)
    bench.load.wait(pump.streams)
    for stream in pump.streams:
        stream.check(bench.expected[stream.rid])
    settled(lambda: snapshot(bench.server) == before, 10, f"everything is as before: {before}")


def next_change_works(bench: Faulty) -> None:
    bench.server.must_scale(3)
    case = bench.cases[0]
    streams = [bench.load.start(case.prompt, FAULTY_TOKENS) for _ in range(3)]
    bench.load.wait(streams)
    for stream in streams:
        stream.check(case.ids)
    assert {rank for stream in streams for rank in stream.ranks} == {0, 1, 2}
    bench.server.must_scale(2)


def test_a_size_that_does_not_fit_is_refused_with_numbers(bench: Faulty) -> None:
    bench.at_two()
    with untouched(bench):
        response = bench.server.post("/scale_elastic_ep", {"new_ep_size": 1, "wait": True})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert "EP size 1 does not fit" in error and re.search(r"device 0 needs \d+ MiB more", error), error
    next_change_works(bench)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`rank` does `action` at `point` of a change to `size`; the operation's error then has these words."""

    point: str
    rank: int
    action: str
    size: int
    words: tuple[str, ...]
    start: int = 2


FAULTS = {
    "joining rank-fails": Fault(point="boot.attached", rank=2, action="raise", size=3, words=("rank 2", "exited")),
    "joining rank-dies": Fault(point="boot.attached", rank=2, action="self", size=3, words=("rank 2", "-9")),
    "joining rank-dies-at-the-gate": Fault(point="boot.barrier", rank=3, action="self", size=4, words=("rank 3",)),
    "joining rank-is-late": Fault(
        point="boot.attached", rank=2, action="stall:60", size=3, words=("preparing", "15 s")
    ),
    "pull-fails": Fault(point="pull.started", rank=1, action="raise", size=2, start=3, words=("injected", "rank 1")),
    "rank-is-late-at-the-gate": Fault(
        point="barrier.before", rank=1, action="stall:6", size=3, words=("committing", "4 s")
    ),
}


@pytest.mark.soak
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_failure_before_the_commit_is_undone(impatient: Faulty, fault: Fault) -> None:
    bench = impatient
    bench.at_two()
    if fault.start != 2:
        bench.server.must_scale(fault.start)
    with untouched(bench):
        arm(bench.run_dir, fault.point, fault.rank, fault.action)
        operation = bench.server.scale(fault.size)
        assert not armed(bench.run_dir), "the fault did not happen"
        assert operation["phase"] == "rolled_back", f"{operation['error']}\n{bench.server.log_tail(100)}"
        assert all(word in operation["error"] for word in fault.words), operation["error"]
        assert bench.server.operation(operation["operation_id"]).items() <= operation.items()
        state = bench.server.get("/is_scaling_elastic_ep").json()
        assert (state["scale_phase"], state["last_error"]) == ("failed", operation["error"])
    bench.at_two()
    next_change_works(bench)


def test_a_joining_rank_is_killed_while_it_boots(bench: Faulty) -> None:
    bench.at_two()
    with untouched(bench):
        arm(bench.run_dir, "boot.attached", 2, "stall:20")
        accepted = bench.server.scale(3, wait=False)
        settled(lambda: not armed(bench.run_dir), 60, "the joining rank boots")
        [joining_rank] = [rank for rank in bench.server.status()["ranks"] if rank["state"] == "joining"]
        assert joining_rank["rank"] == 2
        os.kill(joining_rank["pid"], signal.SIGKILL)
        operation = bench.server.ended(accepted["operation_id"])
        assert operation["phase"] == "rolled_back"
        assert f"pid {joining_rank['pid']}" in operation["error"] and "status -9" in operation["error"]
    next_change_works(bench)


def test_memory_runs_out_inside_prepare(bench: Faulty) -> None:
    """The check of the budget has passed; somebody else takes the memory before the survivor asks for it."""
    bench.at_two()
    bench.server.must_scale(4)
    memory = bench.server.status()["memory"]
    with HmmClient(memory["endpoint"], name="greedy") as client, untouched(bench):
        arm(bench.run_dir, "pull.started", 1, "stall:2")
        accepted = bench.server.scale(2, wait=False)
        settled(lambda: not armed(bench.run_dir), 60, "the survivor begins to pull")
        device = client.status().devices[1]
        blocks = client.allocate(1, "other", nbytes=(device.budget - device.used) // 4096 * 4096)
        operation = bench.server.ended(accepted["operation_id"])
        client.release([block.block_id for block in blocks])
        assert operation["phase"] == "rolled_back", operation["error"]
        assert "device 1" in operation["error"] and "rank 1" in operation["error"], operation["error"]
    bench.at_two()
    next_change_works(bench)


@pytest.mark.soak
def test_the_hmm_does_not_answer(bench: Faulty) -> None:
    bench.at_two()
    with untouched(bench):
        pid = bench.server.status()["memory"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            response = bench.server.post("/scale_elastic_ep", {"new_ep_size": 3, "wait": True})
            status = bench.server.status()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert response.status_code == 503, response.text
        assert "HMM" in response.json()["error"] and "Serving goes on" in response.json()["error"]
        assert not status["memory"]["available"] and "HMM" in status["memory"]["error"]
        assert status["membership"] == [0, 1]
        settled(lambda: bench.server.status()["memory"]["available"], 30, "the HMM answers again")
    next_change_works(bench)


@pytest.mark.soak
def test_a_standby_is_killed(bench: Faulty) -> None:
    bench.at_two()
    with untouched(bench):
        pid = standby_pid(bench.server)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        settled(lambda: standby_pid(bench.server) not in (None, pid), 60, "another standby")
        assert not psutil.pid_exists(pid)
    next_change_works(bench)


@pytest.mark.soak
def test_the_client_of_a_waiting_request_leaves(bench: Faulty) -> None:
    bench.at_two()
    operation_id = f"left-alone-{time.time_ns()}"
    body = json.dumps({"new_ep_size": 3, "wait": True, "operation_id": operation_id}).encode()
    head = (
        f"POST /scale_elastic_ep HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection(("127.0.0.1", bench.server.port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        settled(known(bench, operation_id), 10, "the operation starts")
    assert bench.server.ended(operation_id)["phase"] == "done"
    assert bench.server.status()["membership"] == [0, 1, 2]
    bench.server.must_scale(2)


def known(bench: Faulty, operation_id: str) -> Callable[[], bool]:
    return lambda: bench.server.get(f"/elastic_ep/operations/{operation_id}").status_code == 200
