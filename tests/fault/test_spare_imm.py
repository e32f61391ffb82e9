"""The IMM and rank 0 die together on a server that keeps a spare IMM: rank 0 is replaced by what that one forks."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from elasticmoe_patches.imm import SPARE_TITLE, TITLE
from tests.e2e.conftest import Corpora
from tests.fault.test_hard_faults import pid_of
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import whole
from tests.helpers.load import Load, settled
from tests.helpers.shared import Shared

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


@pytest.fixture
def server(shared: Shared, corpora: Corpora, tmp_path: Path) -> Iterator[ElasticServer]:
    shared.close()
    args = ["--elasticmoe-spare-imm", "on"]
    with ElasticServer(corpora["qwen3_moe"].model, args, log=tmp_path / "server.log", ep_size=2, capacity=3) as running:
        yield running


def titled(server: ElasticServer, title: str) -> int | None:
    """The server's own child of this title."""
    for process in psutil.Process(server.pid).children():
        with contextlib.suppress(psutil.Error):  # it has just ended
            if process.cmdline()[:1] == [title]:
                return process.pid
    return None


def strike(server: ElasticServer) -> int | None:
    """Kill the IMM and rank 0's worker; returns once the server is whole. Returns the spare."""
    spare, rank_0 = titled(server, SPARE_TITLE), server.worker_pids()[0]
    for pid in (pid_of(server, "imm"), rank_0):
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    settled(lambda: server.worker_pids().get(0) not in (None, rank_0) and whole(server), 60, "rank 0 is replaced")
    return spare


def test_rank_0_is_replaced_by_what_the_spare_forks(server: ElasticServer, corpora: Corpora) -> None:
    corpus = corpora["qwen3_moe"]
    with Load(server.url) as load:
        for _ in range(2):  # the second time by the spare that was started in the first one's place
            settled(lambda: titled(server, SPARE_TITLE) is not None and whole(server), 120, "a spare has imported")
            pairs = [(load.start(case.prompt, len(case.ids)), case) for case in corpus.cases[:8]]
            for stream, _ in pairs:
                stream.wait_for_tokens(2, 60)
            assert strike(server) == titled(server, TITLE), "the spare is the IMM now"
            load.wait([stream for stream, _ in pairs])
            for stream, case in pairs:
                stream.check(case.ids)
