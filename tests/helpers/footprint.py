"""What the processes of a server hold at rest: descriptors, memory, blocks; and that its end leaves nothing behind."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from elasticmoe_sglang.hmm.client import HmmClient
from tests.helpers.elastic import ElasticServer
from tests.helpers.leaks import holdings, sockets
from tests.helpers.load import Load, settled

# Python's and malloc's arenas settle in the first changes; what is left after them is not to grow with their number.
GROWTH_BYTES = 48 << 20
_TROUBLE = re.compile(
    r"Traceback|leak detected|double free|use-after-free|CRITICAL|could not place the KV", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a server holds, with ranks 0 and 1 active and nothing to do.

    Descriptors are those of the processes that stay; memory is that of all, since processes share pages."""

    descriptors: dict[str, Counter[str]]
    processes: Counter[str]
    shm: frozenset[str]
    sockets: frozenset[str]
    blocks: int
    transactions: int
    clients: int
    memory: Counter[str] = field(compare=False)
    """Bytes (Pss) by process."""
    connections: dict[str, list[str]] = field(compare=False)
    """What a failure shows of sockets."""

    def check(self, earlier: Footprint) -> None:
        """Nothing beyond what was there earlier; memory within GROWTH_BYTES."""
        for name, now in self.descriptors.items():
            more = now - earlier.descriptors[name]
            were, are = "\n".join(earlier.connections[name]), "\n".join(self.connections[name])
            assert not more, f"{name} has more descriptors: {dict(more)}; sockets before:\n{were}\nnow:\n{are}"
        assert self.processes == earlier.processes
        assert self.shm == earlier.shm and self.sockets == earlier.sockets
        counts = (self.blocks, self.transactions, self.clients)
        assert counts == (earlier.blocks, earlier.transactions, earlier.clients)
        grown = self.memory.total() - earlier.memory.total()
        assert grown < GROWTH_BYTES, f"memory has grown by {grown / 2**20:.1f} MiB: {self.memory_since(earlier)}"

    def memory_since(self, earlier: Footprint) -> dict[str, str]:
        """MiB of each process, before and now."""
        names = sorted({*self.memory, *earlier.memory})
        return {name: f"{earlier.memory[name] / 2**20:.1f} -> {self.memory[name] / 2**20:.1f}" for name in names}


def to_two(server: ElasticServer) -> None:
    """Ranks 0 and 1, by way of all four."""
    server.must_scale(4)
    server.must_scale(retire=[2, 3])


def rest(server: ElasticServer, load: Load) -> Footprint:
    """Waits until nothing runs, empties the prefix caches, and looks."""
    load.wait()
    settled(lambda: standbys(server) == 1, 60, "a standby waits")
    settled(lambda: server.post("/flush_cache", {}).status_code == 200, 60, "the caches can be emptied")
    # A rank publishes its load with its batches and now and then, so the last one may be from before its rest.
    settled(lambda: not busy(server), 20, f"nothing is held at rest: {busy(server)}")
    earlier = None
    deadline = time.monotonic() + 20
    # Sockets of clients that have left are closed a moment later.
    while (now := footprint(server)) != earlier and time.monotonic() < deadline:
        earlier = now
        time.sleep(1.0)
    return now


def busy(server: ElasticServer) -> dict[int, tuple[int, int, int]]:
    """Ranks that hold requests or KV slots: (running, waiting, tokens)."""
    loads = loads_of(server)
    held = {
        rank: (loads[rank]["num_running_reqs"], loads[rank]["num_waiting_reqs"], loads[rank]["num_used_tokens"])
        for rank in (0, 1)
    }
    return {rank: each for rank, each in held.items() if each != (0, 0, 0)}


def loads_of(server: ElasticServer) -> dict[int, dict[str, Any]]:
    """What each rank has published of its load last."""
    return {entry["dp_rank"]: entry for entry in server.get("/v1/loads").json()["loads"]}


def standbys(server: ElasticServer) -> int:
    status = server.status()
    assert status["membership"] == [0, 1], status["membership"]
    return sum(rank["state"] == "standby" for rank in status["ranks"])


def footprint(server: ElasticServer) -> Footprint:
    status = server.status()
    endpoint = status["memory"]["endpoint"]
    everybody = [psutil.Process(server.pid), *server.processes()]
    lasting = {"main": server.pid, "hmm": status["memory"]["pid"], "rank 0": server.worker_pids()[0]}
    lasting |= {name: pid for pid, name in named(everybody).items() if name != "other"}
    wait_for_hang_ups(server.pid)
    names = {pid: name for name, pid in lasting.items()}
    memory: Counter[str] = Counter()
    for process in everybody:
        memory[names.get(process.pid, process.name())] += proportional_bytes(process.pid)
    # Before this test's own client: the HMM closes its side of that a moment later.
    descriptors = {name: holdings(pid).descriptors for name, pid in lasting.items()}
    connections = {name: sockets(pid) for name, pid in lasting.items()}
    with HmmClient(endpoint, name="test") as client:
        hmm = client.status()
    return Footprint(
        descriptors=descriptors,
        connections=connections,
        processes=Counter(process.name() for process in everybody),
        shm=frozenset(name for process in everybody for name in shared_memory(process.pid)),
        sockets=frozenset(os.listdir(Path(endpoint.removeprefix("ipc://")).parent)),
        blocks=hmm.blocks,
        transactions=len(hmm.txns),
        clients=len(hmm.clients),
        memory=memory,
    )


def wait_for_hang_ups(pid: int, timeout_s: float = 10.0) -> None:
    """Until the server has closed the connections whose clients have: the one of a request just made is among its
    descriptors for a moment, and gone when its sockets are listed. One that stays is left for the caller to find."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        connections = psutil.Process(pid).net_connections(kind="tcp")
        if all(each.status == psutil.CONN_LISTEN for each in connections):
            return
        time.sleep(0.05)


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


def leaves_nothing(server: ElasticServer, footprint: Footprint) -> None:
    """After the server's orderly end: no process, no shared memory, no run folder."""
    run_dir = Path(server.status()["memory"]["endpoint"].removeprefix("ipc://")).parent
    pids = [process.pid for process in server.processes()]
    server.stop(timeout_s=60)
    assert server.exit_status == 0, f"{server.exit_status}\n{server.log_tail(60)}"
    assert "CRITICAL" not in server.log_tail() and "being restarted" not in server.log_tail(), server.log_tail()
    settled(lambda: not any(psutil.pid_exists(pid) for pid in pids), 20, "all processes end")
    settled(lambda: not run_dir.exists(), 20, "the run folder is removed")
    left = [path for path in footprint.shm if os.path.exists(path)]
    assert not left, left


def trouble(server: ElasticServer, since: int = 0) -> list[str]:
    """Lines of the server's log, from byte `since` on, that must not be in it."""
    text = server.log.read_bytes()[since:].decode(errors="replace")
    return [line for line in text.splitlines() if _TROUBLE.search(line)]
