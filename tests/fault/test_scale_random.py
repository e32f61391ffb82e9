"""Random changes under load, with random lengths, aborts and disconnects: nothing is lost, doubled or left behind.

A few changes in every test run, fifty in `make soak`. SGLang's own checks of its memory pools are on, after every
batch and when idle; one that fails ends the worker, which shows here as another pid.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_sglang.tiny_model import VOCAB, make_tiny_model
from tests.helpers.chaos import TOKENS, Chaos
from tests.helpers.corpus import ask
from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.footprint import Footprint, leaves_nothing, rest, to_two, trouble
from tests.helpers.load import Load, Pump, settled
from tests.helpers.record import record
from tests.helpers.shared import STRICT, Shared

pytestmark = pytest.mark.server

STREAMS = 8
FEW = 7
MANY = 50


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ElasticServer]:
    model = make_tiny_model(tmp_path / "model", arch="qwen3_moe")
    args = ["--page-size", "4", "--max-running-requests", str(6 * RANKS), "--chunked-prefill-size", str(64 * RANKS)]
    with ElasticServer(model, args, log=tmp_path / "server.log", env=STRICT) as server:
        yield server


@pytest.mark.shared("steady", "last")  # it ends the server
@pytest.mark.timeout(600)
def test_a_few_random_changes(shared: Shared) -> None:
    random_changes(shared.steady(), FEW, seed=12)


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_many_random_changes(server: ElasticServer, changes: int | None, seed: int | None) -> None:
    """`--changes` and `--seed` set how many and which."""
    count, seed = changes or MANY, MANY if seed is None else seed
    record("random-changes", f"{count} changes, seed {seed}", random_changes(server, count, seed=seed))


def random_changes(server: ElasticServer, count: int, *, seed: int) -> dict[str, Any]:
    """Makes them, checks everything, and returns what happened."""
    started = time.monotonic()
    rng = random.Random(seed)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.choice((1, 5, 30, 120, 300)))] for _ in range(24)]
    rank_zero = server.worker_pids()[0]
    # What SGLang says while starting is not ours: its own first request may come before its port is open.
    booted = server.log.stat().st_size
    with Load(server.url, headers=server.headers) as load:
        chaos = Chaos(cases=ask(load, prompts, TOKENS), rng=rng)
        with Pump(load, chaos.request, STREAMS):
            for size in (4, 1, 2):  # every rank was used once before anything is counted
                server.must_scale(size)
        before = rest(server, load)
        with Pump(load, chaos.request, STREAMS):
            operations = [change(server, rng) for _ in range(count)]
            settled(lambda: chaos.has_cut(load), 60, "clients abort and disconnect")
            to_two(server)
        after = rest(server, load)
        chaos.check(load)
    found = summary(load, operations, before, after) | {"seconds": round(time.monotonic() - started, 1)}
    print(found)
    after.check(before)
    assert server.worker_pids()[0] == rank_zero, "rank 0 did not live through it"
    found_wrong = trouble(server, since=booted)
    assert not found_wrong, found_wrong[:10]
    leaves_nothing(server, after)
    return found


def change(server: ElasticServer, rng: random.Random) -> dict[str, Any]:
    """A random size, or random ranks to retire, now and then right after the change before."""
    time.sleep(rng.choice((0.0, 0.2, 0.6)))
    members = server.status()["membership"]
    if len(members) > 1 and rng.random() < 0.4:
        return server.must_scale(retire=rng.sample(members[1:], rng.randint(1, len(members) - 1)))
    return server.must_scale(rng.choice([size for size in range(1, RANKS + 1) if size != len(members)]))


def summary(load: Load, operations: list[dict[str, Any]], before: Footprint, after: Footprint) -> dict[str, Any]:
    """Counts, and the pauses in milliseconds; what was lost, doubled or leaked would have failed the test."""
    pauses = [operation["max_pause_ms"] for operation in operations if operation["max_pause_ms"] is not None]
    return {
        "changes": len(operations),
        **load.summary(),
        "requests_moved": sum(operation["moved_requests"] for operation in operations),
        "memory_mib": round(after.memory.total() / 2**20, 1),
        "memory_growth_mib": round((after.memory.total() - before.memory.total()) / 2**20, 1),
        "pause_ms_median": round(statistics.median(pauses), 1),
        "pause_ms_max": round(max(pauses), 1),
    }
