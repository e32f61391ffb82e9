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

import pytest

from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.load import settled
from tests.helpers.record import record
from tests.helpers.restarts import HIDDEN, PROMPT, Site
from tests.helpers.server import ServerFailed
from tests.helpers.shared import Shared

pytestmark = [pytest.mark.server, pytest.mark.shared("site"), pytest.mark.timeout(600)]

SHARE = 0.25
FINGERPRINT_BYTES = 4 << 20
"""More than the header, both ends and the kernel's read-ahead at each place."""


def test_a_killed_server_comes_back_without_reading_the_checkpoint(
    shared: Shared, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site: Site = shared.site()
    size = site.weights.stat().st_size
    first = site.running()
    first.must_scale(3)
    before = first.generate(PROMPT, 24)["output_ids"]
    os.kill(first.pid, signal.SIGKILL)
    settled(site.alone, 15, "every process of the server has ended")
    kept = [(device.device, device.by_kind) for device in site.hmm.status().devices]
    second = site.next()
    cold, warm = site.starts[0], site.starts[-1]
    status = second.status()
    assert warm.answer == before == cold.answer
    assert status["membership"] == [0, 1] and status["memory"]["pid"] == site.hmm.status().pid
    held = {device.device: device.by_kind for device in site.hmm.status().devices}
    assert held[2] == {}, f"what the third rank had is given back: {kept} before, {held} now"
    assert second.must_scale(4)["phase"] == "done"
    found = {
        "checkpoint_bytes": size,
        "cold": {"read_bytes": cold.read_bytes, "load_s": round(cold.load_s, 3), "boot_s": round(cold.boot_s, 1)},
        "restart": {"read_bytes": warm.read_bytes, "load_s": round(warm.load_s, 3), "boot_s": round(warm.boot_s, 1)},
        "restart_resident_bytes": warm.resident_bytes,
        "load_share": round(warm.load_s / cold.load_s, 3),
    }
    print(found)
    record("server-restart", f"{size >> 20} MiB", found)
    assert cold.read_bytes > 0.9 * size
    assert warm.read_bytes == 0
    if warm.resident_bytes is not None:
        assert warm.resident_bytes < FINGERPRINT_BYTES, f"{warm} of {size} bytes of the checkpoint came into memory"
    assert warm.load_s <= SHARE * cold.load_s

    site.stop()
    other = make_tiny_model(tmp_path_factory.mktemp("other"), hidden=HIDDEN, seed=1)
    with (
        pytest.raises(ServerFailed, match="the HMM holds another model: fingerprint"),
        site.server(other, "other.log"),
    ):
        pass
    after = {device.device: device.by_kind for device in site.hmm.status().devices}
    assert any(after.values()), "the refusal leaves the HMM's memory alone"
