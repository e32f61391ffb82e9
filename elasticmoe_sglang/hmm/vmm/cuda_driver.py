"""The CUDA driver behind `cuda-bindings`: loaded once, every failure raised as a typed error.

`cuda-bindings` imports on any machine; `load` fails where there is no driver or no GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elasticmoe_sglang.errors import (
    BadDriverCall,
    DeviceFault,
    DriverError,
    DriverRefused,
    DriverUnsupported,
    OutOfDeviceMemory,
)


@dataclass(frozen=True, kw_only=True)
class _Meaning:
    error: type[DriverError]
    hint: str | None = None


_NO_DRIVER = "Check `nvidia-smi`; in a container, start it with access to the GPUs."
_RULES = "The call breaks a rule of the driver's virtual memory management; this is a fault of ElasticMoE's."
_BROKEN = "Check `nvidia-smi` and `dmesg` (Xid); every process that used the device has to be restarted."


def _rows(error: type[DriverError], rows: Sequence[tuple[int, str | None]]) -> dict[int, _Meaning]:
    return {code: _Meaning(error=error, hint=hint) for code, hint in rows}


# By CUresult (cuda.h of CUDA 13). What is not listed is a DeviceFault: the driver was asked for something ordinary.
MEANINGS: dict[int, _Meaning] = {
    **_rows(
        BadDriverCall,
        [
            (1, _RULES),  # INVALID_VALUE
            (3, None),  # NOT_INITIALIZED
            (101, "Check CUDA_VISIBLE_DEVICES: all processes of a server must see the same devices."),  # INVALID_DEVICE
            (201, _RULES),  # INVALID_CONTEXT
            (205, _RULES),  # MAP_FAILED
            (400, "The handle was closed, or is another process's."),  # INVALID_HANDLE
            (708, _RULES),  # PRIMARY_CONTEXT_ACTIVE
        ],
    ),
    **_rows(OutOfDeviceMemory, [(2, "Lower the HMM's budget, or end what else uses the device (`nvidia-smi`).")]),
    **_rows(
        DriverRefused,
        [
            (46, "Another process has the device for itself: set compute mode Default, or use MPS."),  # UNAVAILABLE
            (800, "Processes that share memory run as one user, and all of them with MPS or none."),  # NOT_PERMITTED
            (304, "The descriptor is no memory handle, or its memory is gone."),  # OPERATING_SYSTEM
        ],
    ),
    **_rows(
        DriverUnsupported,
        [
            (801, "It needs a GPU and driver with virtual memory management (Volta or newer)."),  # NOT_SUPPORTED
            (217, "Ranks whose devices cannot reach each other cannot share windows."),  # PEER_ACCESS_UNSUPPORTED
        ],
    ),
    **_rows(DeviceFault, [(100, _NO_DRIVER), (999, _BROKEN)]),  # NO_DEVICE, UNKNOWN
}


class CudaDriver:
    """Calls by name: `driver("cuMemCreate", ...)` returns what the call returns besides its status, or raises.

    Attributes:
        api: the module `cuda.bindings.driver`, for its types and enumerations.
    """

    def __init__(self, api: Any) -> None:
        self.api = api

    def __call__(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self.api, name)(*arguments)
        self.check(int(status), name)
        return values[0] if len(values) == 1 else tuple(values)

    def check(self, status: int, call: str) -> None:
        """Raises the error that a CUresult stands for; nothing for success."""
        if status == 0:
            return
        meaning = MEANINGS.get(status, _Meaning(error=DeviceFault, hint=_BROKEN))
        name = self.api.CUresult(status).name
        raise meaning.error(f"{call} failed: {name} ({status})", code=status, operation=call, hint=meaning.hint)


@functools.cache
def load() -> CudaDriver:
    """The driver, initialised. Makes no context. Raises DriverError where there is no driver or no device."""
    try:
        from cuda.bindings import driver as api
    except ImportError as error:
        raise DriverUnsupported(
            "the package cuda-bindings is not installed", code=0, hint="pip install 'elasticmoe-sglang[cuda]'."
        ) from error
    driver = CudaDriver(api)
    try:
        driver("cuInit", 0)
    except RuntimeError as error:  # how cuda-bindings says that libcuda.so.1 cannot be loaded
        raise DeviceFault(f"there is no NVIDIA driver: {error}", code=0, hint=_NO_DRIVER) from error
    return driver


def total_memory() -> list[int]:
    """Bytes of each GPU that this process sees, device number = index. Makes no context. Raises DriverError as `load`
    does."""
    driver = load()
    count = int(driver("cuDeviceGetCount"))
    return [int(driver("cuDeviceTotalMem", driver("cuDeviceGet", device))) for device in range(count)]
