"""Workers that stay booted for inactive ranks: changes without a boot, with streams that go on, and their deaths."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from elasticmoe_sglang.faults import ENV_FAULTS
from tests.e2e.conftest import Corpora
from tests.helpers.corpus import Case, Corpus
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import arm, armed, ask_for, change, imbalance, whole
from tests.helpers.load import Load, Stream, settled
from tests.helpers.record import record

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

HOT = 2
SIZES = (3, 1, 4, 2, 3, 2)
"""From 2 on. Retiring ranks stay as hot standbys while there are fewer than two; rank 3 boots for the change to 4."""
KV_TOKENS = 4096


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, corpora: Corpora) -> Iterator[tuple[ElasticServer, Corpus, Path]]:
    folder = tmp_path_factory.mktemp("hot")
    corpus = corpora["qwen3_moe"]
    run_dir = folder / "run"
    args = ["--elasticmoe-hot-standbys", str(HOT), "--elasticmoe-run-dir", str(run_dir)]
    env = {ENV_FAULTS: "1"}
    with ElasticServer(corpus.model, args, log=folder / "server.log", kv_tokens=KV_TOKENS, env=env) as server:
        yield server, corpus, run_dir


def hot_ranks(server: ElasticServer) -> dict[int, int]:
    return {rank["rank"]: rank["pid"] for rank in server.status()["ranks"] if rank["state"] == "hot"}


def await_hot(server: ElasticServer, ranks: Sequence[int], timeout_s: float = 60.0) -> dict[int, int]:
    settled(lambda: sorted(hot_ranks(server)) == list(ranks), timeout_s, f"hot standbys of ranks {list(ranks)}")
    return hot_ranks(server)


def start(load: Load, cases: Sequence[Case], count: int, seed: int) -> list[tuple[Stream, Case]]:
    started = [(load.start(case.prompt, len(case.ids)), case) for case in random.Random(seed).sample(cases, count)]
    for stream, _ in started:
        stream.wait_for_tokens(3, 60)
    return started


def finish(load: Load, streams: Sequence[tuple[Stream, Case]]) -> None:
    load.wait([stream for stream, _ in streams])
    for stream, case in streams:
        stream.check(case.ids)


def test_changes_need_no_boot(served: tuple[ElasticServer, Corpus, Path]) -> None:
    server, corpus, _ = served
    pids = await_hot(server, [2, 3])
    assert imbalance(server.status()) is None, imbalance(server.status())
    rows: list[dict[str, Any]] = []
    with Load(server.url) as load:
        for number, size in enumerate(SIZES):
            before = hot_ranks(server)
            streams = start(load, corpus.cases, 8, number)
            operation = server.must_scale(size)
            active = server.worker_pids()
            joined = set(operation["ranks_after"]) - set(operation["ranks_before"])
            for rank in joined & before.keys():
                assert active[rank] == before[rank], f"rank {rank} was booted again"
            finish(load, streams)
            rows.append(
                {
                    "size": size,
                    "hot_before": sorted(before),
                    "hot_after": sorted(hot_ranks(server)),
                    "preparing_ms": operation["timings"]["preparing_ms"],
                    "finishing_ms": operation["timings"]["finishing_ms"],
                    "pause_ms": operation["max_pause_ms"],
                }
            )
            settled(lambda: imbalance(server.status()) is None, 10, "the ledger agrees with the placement")
    assert rows[0]["hot_before"] == [2, 3] and rows[0]["hot_after"] == [3]
    # 3 -> 1: one place was free, for the lowest of the retiring ranks.
    assert rows[1]["hot_after"] == [1, 3]
    assert psutil.pid_exists(pids[3])
    record("hot-standbys", "qwen3_moe", {"changes": rows})


def test_a_hot_standby_that_dies_is_replaced(served: tuple[ElasticServer, Corpus, Path]) -> None:
    server, corpus, _ = served
    change(server, 2)
    pids = await_hot(server, [2, 3])
    psutil.Process(pids[2]).kill()
    settled(lambda: hot_ranks(server).get(2, pids[2]) != pids[2], 60, "another hot standby for rank 2")
    assert imbalance(server.status()) is None, imbalance(server.status())
    with Load(server.url) as load:
        streams = start(load, corpus.cases, 6, 20)
        server.must_scale(4)
        finish(load, streams)
    change(server, 2)


@pytest.mark.parametrize("point", ["hot.joining", "boot.barrier"])
def test_a_hot_standby_dies_while_it_joins(served: tuple[ElasticServer, Corpus, Path], point: str) -> None:
    """Before it has said that it is ready another worker boots instead; at the barrier the change is rolled back."""
    server, corpus, run_dir = served
    change(server, 2)
    await_hot(server, [2, 3])
    with Load(server.url) as load:
        streams = start(load, corpus.cases, 6, 30)
        arm(run_dir, point, 2, "self")
        operation = ask_for(server, {"new_ep_size": 3, "wait": True})
        assert not armed(run_dir)
        assert operation["phase"] in ("done", "rolled_back"), operation
        assert point == "boot.barrier" or operation["phase"] == "done", operation["error"]
        finish(load, streams)
    settled(lambda: whole(server), 30, "the server is whole")
    change(server, 2)
    await_hot(server, [2, 3])
    assert imbalance(server.status()) is None, imbalance(server.status())


@pytest.mark.parametrize("point", ["retire.sending", "retire.sent", "hot.parking"])
def test_a_retiring_rank_dies_before_it_is_a_hot_standby(
    served: tuple[ElasticServer, Corpus, Path], point: str
) -> None:
    server, corpus, run_dir = served
    change(server, 4)
    with Load(server.url) as load:
        streams = start(load, corpus.cases, 8, 40)
        arm(run_dir, point, 2, "self")
        operation = ask_for(server, {"new_ep_size": 2, "wait": True})
        assert not armed(run_dir)
        assert operation["phase"] == "done", operation
        finish(load, streams)
    settled(lambda: whole(server), 30, "the server is whole")
    await_hot(server, [2, 3])
    assert imbalance(server.status()) is None, imbalance(server.status())


def test_another_hmm_adopts_the_memory_of_hot_standbys(served: tuple[ElasticServer, Corpus, Path]) -> None:
    server, corpus, _ = served
    change(server, 2)
    pids = await_hot(server, [2, 3])
    before = server.status()["memory"]
    psutil.Process(before["pid"]).kill()
    settled(
        lambda: server.status()["memory"]["available"] and server.status()["memory"]["pid"] != before["pid"],
        30,
        "another HMM",
    )
    settled(lambda: imbalance(server.status()) is None, 10, "the ledger agrees with the placement")
    with Load(server.url) as load:
        streams = start(load, corpus.cases, 6, 50)
        server.must_scale(4)
        assert {rank: pid for rank, pid in server.worker_pids().items() if rank in pids} == pids
        finish(load, streams)
    change(server, 2)


def test_the_log_has_no_complaints(served: tuple[ElasticServer, Corpus, Path]) -> None:
    server, _, _ = served
    assert server.running
    text = "\n".join(server.log_lines("Traceback"))
    assert not re.search("AssertionError|KeyError", text), text
