"""Reading and writing GPU memory by address, for tests. Uses the primary context of GPU 0."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elasticmoe_sglang.hmm.vmm import cuda_driver


@functools.cache
def _context() -> Any:
    driver = cuda_driver.load()
    return driver("cuDevicePrimaryCtxRetain", driver("cuDeviceGet", 0))


@contextmanager
def current_context() -> Iterator[cuda_driver.CudaDriver]:
    """The driver, with a context in this thread."""
    driver = cuda_driver.load()
    driver("cuCtxPushCurrent", _context())
    try:
        yield driver
    finally:
        driver("cuCtxPopCurrent")


def read(va: int, nbytes: int) -> bytes:
    """The bytes at [va, va + nbytes)."""
    buffer = ctypes.create_string_buffer(nbytes)
    with current_context() as driver:
        driver("cuMemcpyDtoH", ctypes.addressof(buffer), va, nbytes)
    return buffer.raw


def write(va: int, data: bytes) -> None:
    """Puts `data` at `va`."""
    buffer = ctypes.create_string_buffer(data, len(data))
    with current_context() as driver:
        driver("cuMemcpyHtoD", va, ctypes.addressof(buffer), len(data))
