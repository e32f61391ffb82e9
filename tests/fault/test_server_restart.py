"""The server's main process is killed: a new one attaches to the HMM that lives on, and reads no checkpoint."""

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
from tests.helpers.server import ServerFailed

# In `make soak` until it has passed alone on a quiet machine.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.soak]

BUDGET = 1 << 30
PROMPT = list(range(5, 40))


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
    """Bytes that the seats read of the checkpoint, and the seconds of the slowest."""
    seats = [seat for seat in status["seats"] if seat["state"] == "occupied"]
    return sum(seat["checkpoint_bytes"] for seat in seats), max(seat["load_s"] for seat in seats)


def test_a_killed_server_comes_back_without_reading_the_checkpoint(hmm: HmmClient, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", hidden=512)
    with server(hmm, model, tmp_path / "first.log") as first:
        cold = loading(first.status())
        first.must_scale(3)
        before = first.generate(PROMPT, 24)["output_ids"]
        os.kill(first.pid, signal.SIGKILL)
        settled(lambda: [c.name for c in hmm.status().clients] == ["test"], 15, "every process of the server has ended")
    kept = [(device.device, device.by_kind) for device in hmm.status().devices]
    with server(hmm, model, tmp_path / "second.log") as second:
        status = second.status()
        warm = loading(status)
        assert second.generate(PROMPT, 24)["output_ids"] == before
        assert status["membership"] == [0, 1] and status["memory"]["pid"] == hmm.status().pid
        held = {device.device: device.by_kind for device in hmm.status().devices}
        assert held[2] == {}, f"what the third seat had is given back: {kept} before, {held} now"
        assert second.must_scale(4)["phase"] == "done"
    print(f"cold start: {cold[0]} bytes of the checkpoint, load {cold[1]:.3f} s; restart: {warm[0]}, {warm[1]:.3f} s")
    assert cold[0] > 0.9 * (model / "model.safetensors").stat().st_size
    assert warm[0] == 0

    other = make_tiny_model(tmp_path / "other", hidden=512, seed=1)
    with (
        pytest.raises(ServerFailed, match="the HMM holds another model: fingerprint"),
        server(hmm, other, tmp_path / "third.log"),
    ):
        pass
    assert {device.device: device.by_kind for device in hmm.status().devices} != {}, "the refusal leaves the HMM alone"
