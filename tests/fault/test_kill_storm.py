"""Kills that do not wait for each other, under a full queue, while sizes change: nothing lost, nothing doubled.

Workers, and now and then the HMM or a standby, are killed at random times, often two or three within a fraction of a
second, in whatever phase the server is; the next kill does not wait until the last one has healed. Each kill's phase is
recorded. `--kills` and `--seed` set how many and which.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import requests

from elasticmoe_sglang.tiny_model import VOCAB, Arch, make_tiny_model
from tests.helpers.chaos import TOKENS, Chaos
from tests.helpers.corpus import ask
from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.faults import SETTLED_WITHIN_S, change, imbalance, whole
from tests.helpers.footprint import leaves_nothing, rest, to_two
from tests.helpers.load import Load, Pump, Stream, settled, silences
from tests.helpers.record import record

pytestmark = [pytest.mark.server, pytest.mark.soak, pytest.mark.timeout(6000)]

KILLS = 260
STREAMS = 12
RUNNING_PER_RANK = 2
"""Fewer than the streams of a rank, so that requests wait."""
LENGTHS = (1, 5, 30, 120, 300, 1000, 2000)
BETWEEN_S = 3.0
AGAIN = 0.4
"""How often another kill follows within AGAIN_WITHIN_S."""
AGAIN_WITHIN_S = 0.6
"""Most kills come while an earlier one has not healed. With half the time between them two cores boot workers all the
time, and hardly ever serve."""
CHANGE = 0.3
"""How often a change of size is asked for before a kill."""
GAP_P99_S, GAP_MAX_S = 1.0, 2.0


@dataclass
class Kill:
    """victim: what was killed. phase: of the operation that ran. open: kills that had not healed yet."""

    at: float
    victim: str
    phase: str
    open: int


@dataclass
class Storm:
    server: ElasticServer
    rng: random.Random
    kills: list[Kill] = field(default_factory=list)
    restored_s: list[float] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    _open: list[float] = field(default_factory=list)
    _killed: set[int | None] = field(default_factory=set)

    def run(self, number: int) -> None:
        while len(self.kills) < number:
            self._watch(self.rng.expovariate(1 / BETWEEN_S))
            if self.rng.random() < CHANGE:
                self._ask()
            self._kill()
            while self.rng.random() < AGAIN and len(self.kills) < number:
                self._watch(self.rng.random() * AGAIN_WITHIN_S)
                self._kill()

    def over(self) -> bool:
        """The server has noticed every kill, and is whole."""
        status = self.server.status()
        pids = {status["memory"]["pid"], *(rank["pid"] for rank in status["ranks"])}
        return not pids & self._killed and whole(self.server)

    def _watch(self, seconds: float) -> None:
        """Wait, and note when the last target's ranks are all back."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._open and self.over():
                now = time.time()
                self.restored_s += [now - at for at in self._open]
                self._open.clear()
            time.sleep(min(0.05, left))

    def _ask(self) -> None:
        body: dict[str, Any] = {"new_ep_size": self.rng.randint(2, RANKS)}
        members = self.server.status()["membership"]
        if self.rng.random() < 0.4 and len(members) > 2:
            body = {"retire_ranks": [self.rng.choice(members[1:])]}
        answer = self.server.post("/scale_elastic_ep", body)
        assert answer.status_code in (200, 202, 400, 409, 503), answer.text
        self.asked[str(answer.status_code)] += 1

    def _kill(self) -> None:
        status = self.server.status()
        running = status["running"]
        dice = self.rng.random()
        if dice < 0.06:
            victim, pids = "hmm", [status["memory"]["pid"]]
        elif dice < 0.1:
            victim, pids = "standby", [r["pid"] for r in status["ranks"] if r["state"] == "standby"]
        else:
            ranks = [r for r in status["ranks"] if r["state"] in ("active", "joining", "retiring") and r["pid"]]
            chosen = self.rng.choice(ranks) if ranks else {"state": "nobody", "rank": -1, "pid": None}
            victim = f"{chosen['state']}{' rank 0' if chosen['rank'] == 0 else ''}"
            pids = [chosen["pid"]]
        pid = self.rng.choice(pids or [None])
        if pid is None:
            return
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self._killed.add(pid)
            now = time.time()
            phase = "serving" if running is None else f"{running['cause']} {running['phase']}"
            self.kills.append(Kill(now, victim, phase, len(self._open)))
            self._open.append(now)


@pytest.fixture(params=get_args(Arch))
def arch(request: pytest.FixtureRequest) -> Arch:
    made: Arch = request.param
    return made


@pytest.fixture
def server(tmp_path: Path, arch: Arch) -> Iterator[ElasticServer]:
    model = make_tiny_model(tmp_path / "model", arch=arch)
    running = str(RUNNING_PER_RANK * RANKS)
    args = ["--page-size", "4", "--max-running-requests", running]
    with ElasticServer(model, args, log=tmp_path / "server.log") as server:
        yield server


def test_kills_at_any_time_lose_nothing(server: ElasticServer, arch: Arch, kills: int | None, seed: int | None) -> None:
    number, seed = kills or KILLS, KILLS if seed is None else seed
    rng = random.Random(seed)
    started = time.monotonic()
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.choice(LENGTHS))] for _ in range(20)]
    with Load(server.url) as load:
        chaos = Chaos(cases=ask(load, prompts, TOKENS), rng=random.Random(rng.random()))
        with Pump(load, chaos.request, STREAMS):
            change(server, 1)  # every rank is used once before anything is counted
            to_two(server)
        before = rest(server, load)
        first = len(load.streams)
        storm = Storm(server, random.Random(rng.random()))
        waiting = Waiting(server)
        with Pump(load, chaos.request, STREAMS), waiting:
            change(server, RANKS)
            storm.run(number)
            settled(storm.over, SETTLED_WITHIN_S, f"the server is whole: {imbalance(server.status())}")
            to_two(server)
        after = rest(server, load)
        chaos.check(load)
    found = figures(storm, load.streams[first:]) | {
        "queued_median": statistics.median(waiting.seen),
        **load.summary(),
        "memory_growth_mib": round((after.memory.total() - before.memory.total()) / 2**20, 1),
        "memory_mib": after.memory_since(before),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(found)
    record("kill-storm", f"{arch}, seed {seed}, {number} kills", found)
    after.check(before)
    leaves_nothing(server, after)
    whole_before, single = found["silence_when_whole_s"], found["silence_of_one_kill_s"]
    assert whole_before["p99"] <= GAP_P99_S and whole_before["max"] <= GAP_MAX_S, whole_before
    assert single["p99"] <= GAP_P99_S and single["max"] <= GAP_MAX_S, single  # missed on two cores: docs/benchmarks.md


class Waiting:
    """Samples how many requests wait in the queues of all ranks."""

    def __init__(self, server: ElasticServer) -> None:
        self.seen: list[int] = []
        self._server = server
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._end.wait(2.0):
            # A connection of its own, which ends: those of the test's thread are counted.
            answer = requests.get(f"{self._server.url}/v1/loads", headers={"Connection": "close"}, timeout=30)
            if answer.status_code == 200:
                self.seen.append(sum(each["num_waiting_reqs"] for each in answer.json()["loads"]))

    def __enter__(self) -> Waiting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def longest_gap(stream: Stream) -> tuple[float, float]:
    """Seconds of the longest gap between two tokens, and when it began."""
    times = [at for at, _ in stream.arrivals]
    return max(((later - earlier, earlier) for earlier, later in pairwise(times)), default=(0.0, 0.0))


def silences_of(kills: list[Kill], streams: list[Stream]) -> list[tuple[float, list[Kill]]]:
    """Around each kill: seconds in which no stream received a token, and the kills in them; shortest first."""
    spans = ((end - begin, [kill for kill in kills if begin <= kill.at <= end]) for begin, end in silences(streams))
    return sorted(((seconds, inside) for seconds, inside in spans if inside), key=lambda each: each[0])


def figures(storm: Storm, streams: list[Stream]) -> dict[str, Any]:
    longest = sorted(((*longest_gap(stream), stream) for stream in streams), key=lambda each: each[0])
    kills_in = [[kill.victim for kill in storm.kills if at <= kill.at <= at + gap] for gap, at, _ in longest]
    for (gap, at, stream), kills in list(zip(longest, kills_in, strict=True))[-6:]:
        print(
            f"gap of {gap:.2f} s from {time.strftime('%X', time.localtime(at))}: {stream}, {len(kills)} kills: {kills}"
        )
    single = [gap for (gap, _, _), kills in zip(longest, kills_in, strict=True) if len(kills) <= 1]
    silent = silences_of(storm.kills, streams)
    alone = [(seconds, inside[0]) for seconds, inside in silent if len(inside) == 1]
    for seconds, kill in alone[-12:]:
        print(f"{seconds:.2f} s of silence, one kill: {kill}")
    return {
        "kills": len(storm.kills),
        "victims": dict(sorted(Counter(kill.victim for kill in storm.kills).items())),
        "phases": dict(sorted(Counter(kill.phase for kill in storm.kills).items())),
        "overlapping": sum(kill.open > 0 for kill in storm.kills),
        "during_a_recovery": sum(kill.phase.startswith("loss") for kill in storm.kills),
        "asked": dict(storm.asked),
        "gap_s": quantiles([gap for gap, _, _ in longest], "longest gap of each stream, however many kills were in it"),
        "gap_of_one_kill_s": quantiles(
            single, "the same, where at most one kill was in it; waiting for a turn on the ranks that are left included"
        ),
        "silence_s": quantiles([gap for gap, _ in silent], "no stream received a token, around each kill"),
        "silence_of_one_kill_s": quantiles([gap for gap, _ in alone], "the same, with one kill in it"),
        "silence_when_whole_s": quantiles(
            [gap for gap, kill in alone if kill.open == 0], "the same, when all earlier kills had healed"
        ),
        "restored_s": quantiles(
            storm.restored_s, "from a kill until the ranks of the last target serve again, later kills included"
        ),
    }


def quantiles(values: list[float], what: str) -> dict[str, Any]:
    ordered = sorted(values)
    return {
        "what": what,
        "n": len(ordered),
        "p50": round(statistics.median(ordered), 3),
        "p99": round(ordered[len(ordered) * 99 // 100], 3),
        "max": round(ordered[-1], 3),
    }
