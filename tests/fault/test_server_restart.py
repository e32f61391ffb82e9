"""The server's main process is killed: a new one attaches to the HMM that lives on, and reads no checkpoint.

Load time is what each rank measures around SGLang's `load_model`, and the slowest rank counts: the model's modules are
built, the checkpoint's files found and fingerprinted, the weights mapped, and what no device holds is read. The
checkpoint's pages are dropped from the kernel's cache before each start, so the cold start reads it from the disk.
What was read is counted twice: by the loader, as bytes of tensors, and by the kernel, as resident pages of the file,
which has the fingerprint's header and two ends of 64 KiB in it too.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.load import settled
from tests.helpers.page_cache import drop, resident
from tests.helpers.record import record
from tests.helpers.server import ServerFailed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BUDGET = 1 << 30
HIDDEN = 1024
"""About 430 MiB of weights: reading them takes longer than building the modules."""
PROMPT = list(range(5, 40))
SHARE = 0.25
FINGERPRINT_BYTES = 4 << 20
"""More than the header, both ends and the kernel's read-ahead at each place."""


@pytest.fixture
def hmm(tmp_path: Path) -> Iterator[HmmClient]:
    """A sidecar that is run apart from any server."""
    endpoint = f"ipc://{tmp_path}/h/hmm.sock"
    with spawn_hmm(endpoint, [BUDGET] * 4) as process, HmmClient(endpoint, name="test") as client:
        yield client
        assert process.alive()


def server(hmm: HmmClient, model: Path, log: Path) -> ElasticServer:
    return ElasticServer(model, ["--elasticmoe-hmm-endpoint", hmm.endpoint], log=log)


def loading(status: dict[str, Any]) -> tuple[int, float]:
    """Bytes of tensors that the ranks read of the checkpoint, and the load time in seconds of the slowest."""
    ranks = [rank for rank in status["ranks"] if rank["state"] == "active"]
    return sum(rank["checkpoint_bytes"] for rank in ranks), max(rank["load_s"] for rank in ranks)


def test_a_killed_server_comes_back_without_reading_the_checkpoint(hmm: HmmClient, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", hidden=HIDDEN)
    weights = model / "model.safetensors"
    size = weights.stat().st_size
    drop(weights)
    droppable = resident(weights) == 0
    with server(hmm, model, tmp_path / "first.log") as first:
        cold_bytes, cold_s = loading(first.status())
        first.must_scale(3)
        before = first.generate(PROMPT, 24)["output_ids"]
        os.kill(first.pid, signal.SIGKILL)
        settled(lambda: [c.name for c in hmm.status().clients] == ["test"], 15, "every process of the server has ended")
    kept = [(device.device, device.by_kind) for device in hmm.status().devices]
    drop(weights)
    with server(hmm, model, tmp_path / "second.log") as second:
        status = second.status()
        warm_bytes, warm_s = loading(status)
        touched = resident(weights)
        assert second.generate(PROMPT, 24)["output_ids"] == before
        assert status["membership"] == [0, 1] and status["memory"]["pid"] == hmm.status().pid
        held = {device.device: device.by_kind for device in hmm.status().devices}
        assert held[2] == {}, f"what the third rank had is given back: {kept} before, {held} now"
        assert second.must_scale(4)["phase"] == "done"
    found = {
        "checkpoint_bytes": size,
        "cold": {"read_bytes": cold_bytes, "load_s": round(cold_s, 3), "boot_s": round(first.boot_s, 1)},
        "restart": {"read_bytes": warm_bytes, "load_s": round(warm_s, 3), "boot_s": round(second.boot_s, 1)},
        "restart_resident_bytes": touched if droppable else None,
        "load_share": round(warm_s / cold_s, 3),
    }
    print(found)
    record("server-restart", f"{size >> 20} MiB", found)
    assert cold_bytes > 0.9 * size
    assert warm_bytes == 0
    if droppable:
        assert touched < FINGERPRINT_BYTES, f"{touched} of {size} bytes of the checkpoint came into memory"
    assert warm_s <= SHARE * cold_s

    other = make_tiny_model(tmp_path / "other", hidden=HIDDEN, seed=1)
    with (
        pytest.raises(ServerFailed, match="the HMM holds another model: fingerprint"),
        server(hmm, other, tmp_path / "third.log"),
    ):
        pass
    after = {device.device: device.by_kind for device in hmm.status().devices}
    assert any(after.values()), "the refusal leaves the HMM's memory alone"
