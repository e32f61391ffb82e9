"""Which NPUs a process sees and what they have: the product's probe and the real torch_npu, over the stand-in."""

from __future__ import annotations

import ctypes

import pytest
import torch

from elasticmoe_sglang.errors import DriverError
from elasticmoe_sglang.hmm.vmm import acl_probe

pytestmark = pytest.mark.toolchain

CONTEXT_NULL = 107002


@pytest.fixture(autouse=True)
def asked_anew():
    acl_probe.total_memory.cache_clear()


@pytest.mark.parametrize(("visible", "count"), [(None, 4), ("0,2", 2), ("3", 1), ("1,9", 1)])
def test_every_visible_device_and_its_memory(monkeypatch, visible: str | None, count: int) -> None:
    if visible is not None:
        monkeypatch.setenv(acl_probe.VISIBLE, visible)
    found = acl_probe.probe()
    assert (found.soc, found.error, len(found.devices)) == ("Ascend910B3", "", count)
    assert all(0 < device.free <= device.total == 64 << 20 for device in found.devices)
    assert acl_probe.total_memory() == (64 << 20,) * count


@pytest.mark.parametrize("visible", ["", "1,0"])
def test_no_device_is_visible(monkeypatch, visible: str) -> None:
    monkeypatch.setenv(acl_probe.VISIBLE, visible)
    assert acl_probe.probe() == acl_probe.NpuProbe()
    with pytest.raises(DriverError, match="CANN finds none"):
        acl_probe.total_memory()


def test_counting_devices_makes_no_context() -> None:
    """Processes that fork or must hold no device count them."""
    import threading

    seen = []

    def ask() -> None:  # a thread without the context that this process has
        torch.npu.device_count()
        seen.append(ctypes.CDLL("libascendcl.so").aclrtGetCurrentContext(ctypes.byref(ctypes.c_void_p())))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [CONTEXT_NULL]
