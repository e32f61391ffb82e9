"""Virtual memory of devices: one interface, one backend a kind of device.

`get_backend("cpu")` returns the process's one instance, so that its books cover everything the process maps.
"""

from __future__ import annotations

import importlib
import threading

from elasticmoe_sglang.errors import VmmError
from elasticmoe_sglang.hmm.vmm.base import VaRange, VmmBackend, VmmHandle, VmmUsage, round_up

__all__ = [
    "VaRange",
    "VmmBackend",
    "VmmHandle",
    "VmmUsage",
    "backend_names",
    "get_backend",
    "register_backend",
    "round_up",
]

# Named, not imported: a driver's bindings are loaded by those who use them.
_classes: dict[str, str] = {
    "cpu": "elasticmoe_sglang.hmm.vmm.cpu:CpuBackend",
    "cuda": "elasticmoe_sglang.hmm.vmm.cuda:CudaBackend",
    "npu": "elasticmoe_sglang.hmm.vmm.ascend:AscendBackend",
}
_instances: dict[str, VmmBackend] = {}
_lock = threading.Lock()


def register_backend(name: str, location: str) -> None:
    """Makes "package.module:Class" available under `name`."""
    _classes[name] = location


def backend_names() -> list[str]:
    """Names that `get_backend` knows; whether the device exists shows when one is asked for."""
    return sorted(_classes)


def get_backend(name: str) -> VmmBackend:
    """The process's instance of the named backend. Raises VmmError for a name that is not registered."""
    with _lock:
        if name not in _instances:
            if name not in _classes:
                raise VmmError(f"no memory backend is called {name!r}", hint=f"Known: {', '.join(backend_names())}.")
            module, _, cls = _classes[name].partition(":")
            _instances[name] = getattr(importlib.import_module(module), cls)()
        return _instances[name]
