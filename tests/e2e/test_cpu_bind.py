"""A core for each rank: workers stay on their device's cores through changes and replacements, others stay off them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from elasticmoe_sglang.cpu_bind import parse_core_sets, resolve
from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.load import settled

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]


def cores_of(pid: int) -> set[frozenset[int]]:
    """Where each thread of the process may run."""
    return {frozenset(os.sched_getaffinity(thread.id)) for thread in psutil.Process(pid).threads()}


def test_workers_are_bound_through_changes_and_a_replacement(tmp_path: Path) -> None:
    usable = os.sched_getaffinity(0)
    setting = resolve("auto", sorted(usable), ranks=2, devices=2)
    if setting == "off":
        pytest.skip("one core only")
    expected = [frozenset(cores) for cores in parse_core_sets(setting)]
    others = frozenset(usable).difference(*expected) or frozenset(usable)
    log = tmp_path / "server.log"
    args = ["--elasticmoe-cpu-bind", "auto"]
    with ElasticServer(make_tiny_model(tmp_path / "model"), args, log=log, ep_size=1, capacity=2) as server:
        prompt = [5, 6, 7, 8]
        tokens = server.generate(prompt, 8)["output_ids"]

        def bound(ranks: int) -> None:
            workers = server.worker_pids()
            assert sorted(workers) == list(range(ranks))
            for rank, pid in workers.items():
                assert cores_of(pid) == {expected[rank]}, f"rank {rank}"
            for process in [psutil.Process(server.pid), *server.processes()]:
                if process.pid not in workers.values():
                    assert frozenset(process.cpu_affinity() or ()) == others, process.cmdline()
            assert server.generate(prompt, 8)["output_ids"] == tokens

        bound(1)
        server.must_scale(2)
        bound(2)
        os.kill(server.worker_pids()[1], signal.SIGKILL)
        settled(lambda: len(server.worker_pids()) == 1, 60, "rank 1 is lost")
        settled(lambda: len(server.worker_pids()) == 2, 60, "rank 1 is restored")
        bound(2)
        server.must_scale(1)
        bound(1)
        assert [rank["cores"] for rank in server.status()["ranks"]] == [sorted(cores) for cores in expected]
        for rank in (0, 1):
            assert server.log_lines(f"rank {rank}: bound to cores")
