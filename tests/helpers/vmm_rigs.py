"""What the contract suite needs to know of each memory backend beyond the interface. A new backend adds a rig here."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from elasticmoe_sglang.errors import DriverError
from elasticmoe_sglang.hmm.vmm import VmmBackend
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from tests.helpers import cann, cann_standin


@dataclass(frozen=True, kw_only=True)
class Rig:
    """A backend of its own for one test, and how the test reaches the memory behind an address."""

    backend: VmmBackend
    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], None]
    environment: dict[str, str] = field(default_factory=dict)
    """For a second process with the same devices."""
    access: str = "read = ctypes.string_at\ndef write(va, data): ctypes.memmove(va, data, len(data))\n"
    """How a second process reaches the memory."""

    def in_another_process(self, program: str, *fds: int) -> str:
        """Runs `program`, which finds `backend`, `G` (the granularity), `fds`, `read`, `write`; returns its output."""
        setup = (
            "import ctypes\nfrom elasticmoe_sglang.hmm.vmm import get_backend\n"
            f"backend = get_backend({self.backend.name!r}); G = backend.granularity; fds = {list(fds)}\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", setup + self.access + program],
            env={**os.environ, **self.environment},
            pass_fds=fds,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


def _host_write(va: int, data: bytes) -> None:
    ctypes.memmove(va, data, len(data))


@contextmanager
def _cpu() -> Iterator[Rig]:
    yield Rig(backend=CpuBackend(), read=ctypes.string_at, write=_host_write)


@contextmanager
def _npu() -> Iterator[Rig]:
    cann.standin_or_skip()
    from elasticmoe_sglang.hmm.vmm.ascend import AscendBackend

    environment = cann_standin.environment(devices=4, hbm_bytes=256 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANN_STANDIN_HBM_BYTES", str(256 << 20))
        # The stand-in's device memory is host memory, so its addresses can be read and written directly.
        yield Rig(backend=AscendBackend(), read=ctypes.string_at, write=_host_write, environment=environment)


@contextmanager
def _cuda() -> Iterator[Rig]:
    from elasticmoe_sglang.hmm.vmm.cuda import CudaBackend
    from tests.helpers import cuda_memory

    try:
        backend = CudaBackend()
    except DriverError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    access = "from tests.helpers.cuda_memory import read, write\n"
    yield Rig(backend=backend, read=cuda_memory.read, write=cuda_memory.write, access=access)


RIGS = {"cpu": _cpu, "npu": _npu, "cuda": _cuda}
"""By backend name. Each yields a rig, or skips the test and says what is missing."""
