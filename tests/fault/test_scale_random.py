"""Random changes under load, with random lengths, aborts and disconnects: nothing is lost, doubled or left behind.

Twelve changes in every test run, fifty in `make soak`. SGLang's own checks of its memory pools are on, after every
batch and when idle; one that fails ends the seat's process, which shows here as another pid.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.tiny_model import VOCAB, make_tiny_model
from tests.helpers.corpus import Case, ask
from tests.helpers.elastic import SEATS, ElasticServer
from tests.helpers.leaks import holdings
from tests.helpers.load import Load, Pump, Stream, settled

# In `make soak` until it has passed alone on a quiet machine.
pytestmark = [pytest.mark.e2e, pytest.mark.soak]

TOKENS = 120
STREAMS = 8
CUT = 0.2
"""Share of the requests that their clients do not let finish."""
# Python's and malloc's arenas settle in the first changes; what is left after them is not to grow with their number.
GROWTH_BYTES = 48 << 20
_TROUBLE = re.compile(
    r"Traceback|leak detected|double free|use-after-free|CRITICAL|could not place the KV", re.IGNORECASE
)
_STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What the processes that stay hold, with seats 0 and 1 occupied and nothing to do."""

    descriptors: dict[str, Counter[str]]
    processes: Counter[str]
    shm: frozenset[str]
    sockets: frozenset[str]
    blocks: int
    transactions: int
    clients: int
    proportional_bytes: int

    def check(self, earlier: Footprint) -> None:
        """Nothing beyond what was there earlier; memory within GROWTH_BYTES."""
        for name, now in self.descriptors.items():
            more = now - earlier.descriptors[name]
            assert not more, f"{name} has more descriptors: {dict(more)}"
        assert self.processes == earlier.processes
        assert self.shm == earlier.shm and self.sockets == earlier.sockets
        counts = (self.blocks, self.transactions, self.clients)
        assert counts == (earlier.blocks, earlier.transactions, earlier.clients)
        grown = self.proportional_bytes - earlier.proportional_bytes
        assert grown < GROWTH_BYTES, f"memory has grown by {grown / 2**20:.1f} MiB"


@dataclass
class Chaos:
    """Random requests, whose clients leave or abort now and then."""

    cases: list[Case]
    rng: random.Random
    expected: dict[str, list[int]] = field(default_factory=dict)
    doomed: list[tuple[Stream, int]] = field(default_factory=list)

    def request(self, load: Load) -> Stream:
        case = self.rng.choice(self.cases)
        wanted = self.rng.randint(1, TOKENS)
        fields = {"extra_key": str(self.rng.randrange(1 << 30))} if self.rng.random() < 0.3 else {}
        stream = load.start(case.prompt, wanted, **fields)
        self.expected[stream.rid] = case.ids
        if self.rng.random() < CUT:
            self.doomed.append((stream, self.rng.randint(0, wanted)))
        self._cut(load)
        return stream

    def _cut(self, load: Load) -> None:
        """Called with every new request, so the moments are as random as the lengths."""
        for stream, after in [pair for pair in self.doomed if len(pair[0].ids) >= pair[1]]:
            self.doomed.remove((stream, after))
            (load.abort if self.rng.random() < 0.5 else load.disconnect)(stream)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ElasticServer]:
    model = make_tiny_model(tmp_path / "model", arch="qwen3_moe")
    args = ["--page-size", "4", "--max-running-requests", str(6 * SEATS), "--chunked-prefill-size", str(64 * SEATS)]
    with ElasticServer(model, args, log=tmp_path / "server.log", env=_STRICT) as server:
        yield server


@pytest.mark.timeout(600)
def test_twelve_random_changes(server: ElasticServer) -> None:
    random_changes(server, 12)


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_fifty_random_changes(server: ElasticServer) -> None:
    random_changes(server, 50)


def random_changes(server: ElasticServer, count: int) -> None:
    rng = random.Random(count)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.choice((1, 5, 30, 120, 300)))] for _ in range(24)]
    seat_zero = server.seat_pids()[0]
    with Load(server.url) as load:
        chaos = Chaos(cases=ask(load, prompts, TOKENS), rng=rng)
        with Pump(load, chaos.request, STREAMS):
            for size in (4, 1, 2):  # every seat was used once before anything is counted
                server.must_scale(size)
        before = rest(server, load)
        with Pump(load, chaos.request, STREAMS):
            operations = [change(server, rng) for _ in range(count)]
            to_two(server)
        after = rest(server, load)
        check_streams(load, chaos)
    report(load, operations, before, after)
    after.check(before)
    assert server.seat_pids()[0] == seat_zero, "seat 0 did not live through it"
    trouble = [line for line in server.log.read_text(errors="replace").splitlines() if _TROUBLE.search(line)]
    assert not trouble, trouble[:10]
    leaves_nothing(server, after)


def change(server: ElasticServer, rng: random.Random) -> dict[str, Any]:
    """A random size, or random seats to retire, now and then right after the change before."""
    time.sleep(rng.choice((0.0, 0.2, 0.6)))
    members = server.status()["membership"]
    if len(members) > 1 and rng.random() < 0.4:
        return server.must_scale(retire=rng.sample(members[1:], rng.randint(1, len(members) - 1)))
    return server.must_scale(rng.choice([size for size in range(1, SEATS + 1) if size != len(members)]))


def to_two(server: ElasticServer) -> None:
    """Seats 0 and 1, by way of all four."""
    server.must_scale(4)
    server.must_scale(retire=[2, 3])


def rest(server: ElasticServer, load: Load) -> Footprint:
    """Waits until nothing runs, empties the prefix caches, and looks."""
    load.wait()
    settled(lambda: standbys(server) == 1, 60, "a standby waits")
    settled(lambda: server.post("/flush_cache", {}).status_code == 200, 60, "the caches can be emptied")
    loads = {entry["dp_rank"]: entry for entry in server.get("/v1/loads").json()["loads"]}
    for seat in (0, 1):
        busy = (loads[seat]["num_running_reqs"], loads[seat]["num_waiting_reqs"], loads[seat]["num_used_tokens"])
        assert busy == (0, 0, 0), f"seat {seat} holds requests or KV slots at rest: {loads[seat]}"
    earlier = None
    deadline = time.monotonic() + 20
    # Sockets of clients that have left are closed a moment later.
    while (now := footprint(server)) != earlier and time.monotonic() < deadline:
        earlier = now
        time.sleep(1.0)
    return now


def standbys(server: ElasticServer) -> int:
    status = server.status()
    assert status["membership"] == [0, 1], status["membership"]
    return sum(seat["state"] == "standby" for seat in status["seats"])


def footprint(server: ElasticServer) -> Footprint:
    status = server.status()
    endpoint = status["memory"]["endpoint"]
    everybody = [psutil.Process(server.pid), *server.processes()]
    lasting = {"main": server.pid, "hmm": status["memory"]["pid"], "seat 0": server.seat_pids()[0]}
    lasting |= {name: pid for pid, name in named(everybody).items() if name != "other"}
    with HmmClient(endpoint, name="test") as client:
        hmm = client.status()
    return Footprint(
        descriptors={name: holdings(pid).descriptors for name, pid in lasting.items()},
        processes=Counter(process.name() for process in everybody),
        shm=frozenset(name for process in everybody for name in shared_memory(process.pid)),
        sockets=frozenset(os.listdir(Path(endpoint.removeprefix("ipc://")).parent)),
        blocks=hmm.blocks,
        transactions=len(hmm.txns),
        clients=len(hmm.clients),
        proportional_bytes=sum(proportional_bytes(pid) for pid in lasting.values()),
    )


def named(processes: list[psutil.Process]) -> dict[int, str]:
    """The controller, the detokenizer and the IMM by their pids."""
    words = {"data_parallel_controller": "controller", "detokenizer": "detokenizer", "elasticmoe_patches.imm": "imm"}
    found: dict[int, str] = {}
    for process in processes:
        line = " ".join(process.cmdline())
        for word, name in words.items():
            # Standbys are forks of the IMM and have its command line.
            if word in line and name not in found.values():
                found[process.pid] = name
    return found


def shared_memory(pid: int) -> set[str]:
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[5] for line in maps if "/dev/shm/" in line}


def proportional_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def check_streams(load: Load, chaos: Chaos) -> None:
    for stream in load.streams:
        stream.check(chaos.expected.get(stream.rid))
    cut = Counter(stream.cut for stream in load.streams if stream.cut)
    assert set(cut) == {"abort", "disconnect"}, f"the dice gave only {cut}"


def report(load: Load, operations: list[dict[str, Any]], before: Footprint, after: Footprint) -> None:
    ended = Counter(stream.cut or "complete" for stream in load.streams)
    grown = (after.proportional_bytes - before.proportional_bytes) / 2**20
    pauses = [operation["max_pause_ms"] for operation in operations if operation["max_pause_ms"] is not None]
    print(
        f"{len(operations)} changes, {len(load.streams)} requests {dict(ended)}, "
        f"{sum(len(stream.ids) for stream in load.streams)} tokens, "
        f"{sum(operation['moved_requests'] for operation in operations)} requests moved, "
        f"{sum(len(stream.ranks) > 1 for stream in load.streams)} streams on several seats, "
        f"memory {grown:+.1f} MiB of {after.proportional_bytes / 2**20:.0f}, "
        f"pause {statistics.median(pauses):.1f} ms in the median, {max(pauses):.1f} at most"
    )


def leaves_nothing(server: ElasticServer, footprint: Footprint) -> None:
    """After the server's orderly end: no process, no shared memory, no run folder."""
    run_dir = Path(server.status()["memory"]["endpoint"].removeprefix("ipc://")).parent
    pids = [process.pid for process in server.processes()]
    server.stop(timeout_s=60)
    assert server.exit_status == 0
    assert "CRITICAL" not in server.log_tail() and "anew" not in server.log_tail(), server.log_tail()
    settled(lambda: not any(psutil.pid_exists(pid) for pid in pids), 20, "all processes end")
    settled(lambda: not run_dir.exists(), 20, "the run folder is removed")
    left = [path for path in footprint.shm if os.path.exists(path)]
    assert not left, left
