"""A client's command sockets: one between calls, however many calls overlapped."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from tests.helpers.leaks import holdings

PAGE = CpuBackend().granularity


def test_calls_that_overlap_leave_one_socket(tmp_path: Path) -> None:
    with (
        spawn_hmm(f"ipc://{tmp_path}/run/hmm.sock", [1 << 20], log_path=tmp_path / "log") as hmm,
        HmmClient(hmm.endpoint, name="rank-0") as client,
    ):
        blocks = [client.allocate(0, "kv", nbytes=PAGE)[0].block_id for _ in range(4)]

        def sockets() -> int:
            return holdings(hmm.pid).descriptors["socket"]

        before = sockets()
        waiting = [threading.Thread(target=client.wait_sealed, args=([block], 10)) for block in blocks]
        for thread in waiting:
            thread.start()
        deadline = time.monotonic() + 10
        while sockets() < before + len(blocks) and time.monotonic() < deadline:
            client.status()
        assert sockets() >= before + len(blocks), "the calls did not overlap"
        client.seal(blocks)
        for thread in waiting:
            thread.join(10)
        while sockets() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sockets() == before
        assert client.status().blocks == len(blocks)
