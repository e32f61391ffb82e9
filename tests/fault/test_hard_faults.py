"""Faults beside a clean death: processes that stand still or crawl, memory and descriptors refused, clients that
neither read nor leave, the IMM, the HMM and the controller killed.

Streams run through each of them; none is lost, or the end is the one that docs/operations.md names. The cases that
differ least from another one, or wait long, are for `make soak`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from elasticmoe_sglang.descriptors import RESERVE
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import SETTLED_WITHIN_S, ask_for, change, imbalance, whole
from tests.helpers.footprint import named
from tests.helpers.limits import address_space, descriptors, limited, out_of_memory, slowed, stopped
from tests.helpers.load import Pump, Stream, settled
from tests.helpers.restarts import PROMPT, Site
from tests.helpers.server import ServerFailed
from tests.helpers.shared import COLLECTIVE_DEADLINE_S, Faulty, Shared, standby_pid

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]
faulty = pytest.mark.shared("faulty")

STREAMS = 4


def soaked(value: str) -> Any:
    return pytest.param(value, marks=pytest.mark.soak)


@pytest.fixture
def bench(shared: Shared) -> Faulty:
    return shared.faulty()


@contextmanager
def serving(bench: Faulty, size: int) -> Iterator[list[Stream]]:
    """So many ranks decode before the block; after it the server becomes whole, and every stream has all its tokens."""
    server = bench.server
    change(server, size)
    settled(lambda: whole(server), SETTLED_WITHIN_S, "the server is whole before")
    with Pump(bench.load, bench.request, STREAMS) as pump:
        settled(lambda: len(pump.streams) >= STREAMS, 10, "streams start")
        for stream in pump.streams[:STREAMS]:
            stream.wait_for_tokens(4, 60)
        yield pump.streams
        try:
            settled(lambda: whole(server), SETTLED_WITHIN_S, "the server is whole again")
        except TimeoutError as error:
            raise AssertionError(f"{error}: {imbalance(server.status())}\n{server.log_tail(150)}") from error
        proceed(pump.streams)
    bench.load.wait(pump.streams)
    for stream in pump.streams:
        stream.check(bench.expected[stream.rid])


def proceed(streams: list[Stream], tokens: int = 2) -> None:
    """Every stream that runs now gets more tokens."""
    running = [stream for stream in streams if not stream.done.done()]
    for stream, known in [(stream, len(stream.ids)) for stream in running]:
        stream.wait_for_tokens(min(known + tokens, stream.wanted), SETTLED_WITHIN_S)


def pid_of(server: ElasticServer, wanted: str) -> int | None:
    """Of the controller, the detokenizer or the IMM; None while there is none."""
    for process in psutil.Process(server.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if wanted in named([process]).values():
                return process.pid
    return None


def living(server: ElasticServer, wanted: str) -> int:
    """The same, waited for; an IMM until it has a standby."""
    settled(
        lambda: pid_of(server, wanted) is not None and (wanted != "imm" or standby_pid(server) is not None),
        4 * SETTLED_WITHIN_S,  # it imports SGLang
        f"{wanted} runs",
    )
    pid = pid_of(server, wanted)
    assert pid is not None
    return pid


def replaced(bench: Faulty, rank: int, pid: int) -> Callable[[], bool]:
    """The rank's process is not this one any more, and the server is whole."""
    return lambda: bench.server.worker_pids().get(rank) != pid and whole(bench.server)


# -- the IMM ----------------------------------------------------------------------------------------------------------


@faulty
def test_the_imm_is_killed(bench: Faulty) -> None:
    """Workers go on, standbys come back, and a worker that another IMM has adopted is missed when it dies."""
    server = bench.server
    with serving(bench, 3) as streams:
        workers, imm = server.worker_pids(), living(server, "imm")
        os.kill(imm, signal.SIGKILL)
        proceed(streams)
        assert server.worker_pids() == workers
        settled(lambda: pid_of(server, "imm") not in (None, imm), 60, "another IMM starts")
        living(server, "imm")
        assert server.worker_pids() == workers, "no rank has ended"
        os.kill(workers[1], signal.SIGKILL)
        settled(replaced(bench, 1, workers[1]), SETTLED_WITHIN_S, "the adopted worker is missed")
    change(server, 4)
    change(server, 2)


@faulty
@pytest.mark.soak
def test_a_rank_dies_while_there_is_no_imm(bench: Faulty) -> None:
    """Rank 0 needs a standby, and so the next IMM."""
    server = bench.server
    with serving(bench, 3):
        workers, imm = server.worker_pids(), living(server, "imm")
        os.kill(imm, signal.SIGKILL)
        os.kill(workers[2], signal.SIGKILL)
        settled(replaced(bench, 2, workers[2]), SETTLED_WITHIN_S, "a rank is given up without an IMM")
        os.kill(living(server, "imm"), signal.SIGKILL)
        os.kill(workers[0], signal.SIGKILL)
        settled(replaced(bench, 0, workers[0]), 4 * SETTLED_WITHIN_S, "rank 0 is replaced by the next IMM")
    change(server, 2)


@faulty
@pytest.mark.soak
def test_the_imm_is_killed_while_a_rank_joins(bench: Faulty) -> None:
    server = bench.server
    with serving(bench, 2):
        imm = living(server, "imm")
        operation = server.scale(4, wait=False)
        os.kill(imm, signal.SIGKILL)
        ended = server.ended(operation["operation_id"])
        assert ended["phase"] in ("done", "rolled_back"), ended["error"]
        settled(lambda: standby_pid(server) is not None or ended["phase"] == "done", 60, "a standby")
    change(server, 3)


# -- processes that stand still or crawl ------------------------------------------------------------------------------


@faulty
def test_a_rank_stands_still_past_the_collective_deadline(bench: Faulty) -> None:
    with serving(bench, 3):
        pid = bench.server.worker_pids()[1]
        os.kill(pid, signal.SIGSTOP)
        settled(lambda: not psutil.pid_exists(pid), COLLECTIVE_DEADLINE_S + SETTLED_WITHIN_S, "it is ended")
        settled(replaced(bench, 1, pid), SETTLED_WITHIN_S, "the others go on")
    assert bench.server.log_lines("of rank 1 (pid") and bench.server.log_lines("has stalled")


@faulty
def test_a_rank_that_is_slow_is_waited_for(bench: Faulty) -> None:
    with serving(bench, 3) as streams:
        workers = bench.server.worker_pids()
        with slowed(workers[1], runs_s=0.1, stops_s=0.2):
            proceed(streams, 8)
            operation = bench.server.scale(2)
            assert operation["phase"] == "done", operation["error"]
        assert {rank: pid for rank, pid in workers.items() if rank < 2} == bench.server.worker_pids()


@faulty
@pytest.mark.soak
def test_the_imm_and_the_controller_stand_still_for_a_while(bench: Faulty) -> None:
    with serving(bench, 2) as streams:
        workers = bench.server.worker_pids()
        for name in ("imm", "controller"):
            with stopped(living(bench.server, name)):
                time.sleep(1.0)
                settled(lambda: all(stream.done.done() for stream in streams[:STREAMS]), 60, "streams end")
        assert bench.server.worker_pids() == workers


# -- memory -----------------------------------------------------------------------------------------------------------


@faulty
@pytest.mark.soak
@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_is_refused_memory(bench: Faulty, rank: int) -> None:
    """Its address space may not grow: it goes on without, or fails and is lost like a rank that dies."""
    with serving(bench, 3):
        pid = bench.server.worker_pids()[rank]
        with limited(pid, resource.RLIMIT_AS, address_space(pid)):
            operation = ask_for(bench.server, {"new_ep_size": 2 if rank else 4, "wait": True})
            print(f"rank {rank} without memory: {operation['phase']}: {operation['error']}")
            settled(lambda: whole(bench.server), SETTLED_WITHIN_S, "the server is whole")


@faulty
@pytest.mark.soak
def test_a_rank_is_killed_by_its_control_group(bench: Faulty) -> None:
    with serving(bench, 3):
        pid = bench.server.worker_pids()[1]
        with out_of_memory(pid, f"elasticmoe-{os.getpid()}"):
            settled(replaced(bench, 1, pid), 60, "it is given up")


@faulty
@pytest.mark.soak
def test_the_hmm_is_refused_memory(bench: Faulty) -> None:
    with serving(bench, 2):
        pid = bench.server.status()["memory"]["pid"]
        with limited(pid, resource.RLIMIT_AS, address_space(pid)):
            operation = bench.server.scale(4)
        # Where it ends for want of memory another one takes over, and the next change cleans up first.
        if operation["phase"] == "failed":
            settled(lambda: bench.server.status()["memory"]["pid"] != pid, 30, "another HMM takes over")
        else:
            assert operation["phase"] in ("done", "rolled_back"), operation["error"]
    change(bench.server, 3)


# -- descriptors ------------------------------------------------------------------------------------------------------


@faulty
@pytest.mark.parametrize("who", [soaked("rank 1"), "HMM", soaked("IMM")])
def test_descriptors_are_exhausted(bench: Faulty, who: str) -> None:
    """A change is rolled back with the reason, or goes through; serving is not affected, and the next change works."""
    server = bench.server
    with serving(bench, 3):
        pids = {
            "rank 1": server.worker_pids()[1],
            "HMM": server.status()["memory"]["pid"],
            "IMM": living(server, "imm"),
        }
        pid = pids[who]
        room = RESERVE // 2 if who == "HMM" else 0  # less would end it, and another HMM takes over
        with limited(pid, resource.RLIMIT_NOFILE, descriptors(pid) + room):
            operation = server.scale(2 if who == "rank 1" else 4)
            print(who, operation["phase"], operation["error"])
            assert operation["phase"] in ("done", "rolled_back"), operation
        assert psutil.pid_exists(pid) or who == "rank 1"
    change(server, 4)
    change(server, 2)


@faulty
def test_the_main_process_has_no_descriptor_left(bench: Faulty) -> None:
    """Streams that run go on, also where a rank dies; a size that needs another worker is refused; and then all is
    well."""
    server = bench.server
    change(server, 3)
    settled(lambda: whole(server), SETTLED_WITHIN_S, "the server is whole before")
    streams = [bench.request(bench.load) for _ in range(2 * STREAMS)]
    for stream in streams:
        stream.wait_for_tokens(4, 60)
    workers = server.worker_pids()
    with requests.Session() as session:
        session.get(f"{server.url}/elastic_ep/status", timeout=10)  # this connection stays
        with limited(server.pid, resource.RLIMIT_NOFILE, descriptors(server.pid)):
            answer = session.post(f"{server.url}/scale_elastic_ep", json={"new_ep_size": 4, "wait": True}, timeout=60)
            assert answer.json()["phase"] == "rolled_back", answer.text
            assert "no descriptor left for another worker" in answer.json()["error"]
            os.kill(workers[2], signal.SIGKILL)
            bench.load.wait(streams)
    for stream in streams:
        stream.check(bench.expected[stream.rid])
    settled(replaced(bench, 2, workers[2]), SETTLED_WITHIN_S, "rank 2 is given up")
    change(server, 4)
    change(server, 2)


# -- clients ----------------------------------------------------------------------------------------------------------


@faulty
def test_clients_that_neither_send_nor_read_nor_leave(bench: Faulty) -> None:
    """Half a request, half a change, a stream that nobody reads: nobody else waits for them."""
    server = bench.server
    generate = (
        b'{"input_ids": [5, 6, 7], "stream": true, "sampling_params": '
        b'{"max_new_tokens": 400, "temperature": 0, "ignore_eos": true}}'
    )
    head = "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"

    def client(path: str, body: bytes, length: int) -> socket.socket:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(head.format(path=path, length=length).encode() + body)
        return sock

    with serving(bench, 2) as streams, contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(client("/generate", b'{"text"', 400))
            stack.enter_context(client("/scale_elastic_ep", b'{"new_ep', 40))
        for _ in range(2):
            stack.enter_context(client("/generate", generate, len(generate)))
        proceed(streams)
        for size in (4, 2):
            operation = server.scale(size)
            assert operation["phase"] == "done", operation["error"]
        proceed(streams)
    settled(lambda: running_requests(server) == 0, 60, "requests whose clients have left end")


def running_requests(server: ElasticServer) -> int:
    return sum(rank["kv_used"] or 0 for rank in server.status()["ranks"])


# -- the HMM ----------------------------------------------------------------------------------------------------------


@faulty
@pytest.mark.parametrize("first", ["HMM", soaked("rank")])
def test_the_hmm_is_killed_while_a_rank_dies(bench: Faulty, first: str) -> None:
    server = bench.server
    with serving(bench, 4):
        memory, workers = server.status()["memory"]["pid"], server.worker_pids()
        for pid in (memory, workers[2]) if first == "HMM" else (workers[2], memory):
            os.kill(pid, signal.SIGKILL)
        settled(replaced(bench, 2, workers[2]), 2 * SETTLED_WITHIN_S, "rank 2 is given up")
        assert server.status()["memory"]["pid"] != memory
    change(server, 4)
    change(server, 2)


# -- SGLang's own processes -------------------------------------------------------------------------------------------


@pytest.mark.shared("site")
def test_a_second_server_on_the_hmm_is_refused(shared: Shared, tmp_path: Path) -> None:
    site: Site = shared.site()
    server = site.running()
    before = [device.by_kind for device in site.hmm.status().devices]
    stream = server.stream(PROMPT, 200)
    first = next(stream)["output_ids"]
    args = ["--elasticmoe-hmm-endpoint", site.hmm.endpoint]
    second = ElasticServer(site.model, args, log=tmp_path / "second.log")
    with pytest.raises(ServerFailed, match=f"serves another server, whose main process is {server.pid}"), second:
        pass
    assert second.exit_status == 2
    *_, last = stream
    assert len(last["output_ids"]) == 200 and last["output_ids"][: len(first)] == first
    assert [device.by_kind for device in site.hmm.status().devices] == before
    server.must_scale(3)
    server.must_scale(2)


@pytest.mark.shared("site")
@pytest.mark.parametrize("who", ["controller", soaked("detokenizer")])
def test_the_server_ends_with_one_sentence(shared: Shared, who: str) -> None:
    """Within a second; an HMM that stands apart keeps everything."""
    site: Site = shared.site()
    server = site.running()
    kept = [device.by_kind for device in site.hmm.status().devices]
    processes = server.processes()
    pid = living(server, who)
    stream = server.stream(PROMPT, 400)
    next(stream)
    before = len(server.log.read_bytes())
    os.kill(pid, signal.SIGKILL)
    died = time.monotonic()
    settled(lambda: not server.running and site.alone(), 15, "every process has ended")
    took_s = time.monotonic() - died
    assert [device.by_kind for device in site.hmm.status().devices] == kept
    _, alive = psutil.wait_procs(processes, timeout=2)
    assert not alive
    # SGLang's start has tracebacks of its own: it asks its HTTP server for a garbage collection before that listens.
    said = server.log.read_bytes()[before:].decode(errors="replace").splitlines()
    critical = [line for line in said if "the server ends" in line]
    assert len(critical) == 1 and f"(pid {pid})" in critical[0], server.log_tail(40)
    assert not [line for line in said if "Traceback" in line], server.log_tail(60)
    print(f"{who}: all ended after {took_s:.2f} s")
    assert took_s < 1.0
