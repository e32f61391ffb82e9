"""What the tests of the HMM share: sizes, and a second client in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from typing import Any

from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from elasticmoe_sglang.wire import to_hmm
from tests.helpers.leaks import holdings

PAGE = CpuBackend().granularity

MIB = 1 << 20

BUDGETS = (4 * MIB, 2 * MIB)

MODEL = to_hmm.ModelSpec(fingerprint="m", num_columns=16, column_bytes=3 * PAGE - 7, dense_bytes=PAGE)


def descriptors(pid: int | None = None) -> Counter[str]:
    """What the process's descriptors point to; /dev/shm, which other programs use too, is of no concern here."""
    return holdings(pid).descriptors


class Other:
    """A second client in a process of its own: it prints a line where it `tell`s, and waits for one at `wait()`."""

    def __init__(self, endpoint: str, program: str) -> None:
        setup = (
            "import ctypes, os, sys\n"
            "from elasticmoe_sglang.hmm.client import HmmClient\n"
            f"client = HmmClient({endpoint!r}, name='other'); backend = client.backend\n"
            "def tell(text): print(text, flush=True)\n"
            "def wait(): sys.stdin.readline()\n"
            "def mapped(block):\n"
            "    va, [handle] = backend.reserve(block.nbytes), client.handles([block.block_id])\n"
            "    backend.map(va.base, handle); backend.close(handle); return va\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", setup + program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def eventually(condition: Any, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def used(client: HmmClient) -> list[int]:
    return [device.used for device in client.status().devices]


def mapped_write(client: HmmClient, block: to_hmm.Block, data: bytes) -> None:
    import ctypes

    [handle] = client.handles([block.block_id])
    va = client.backend.reserve(block.nbytes)
    client.backend.map(va.base, handle)
    client.backend.close(handle)
    ctypes.memmove(va.base, data, len(data))
    client.backend.unmap(va.base, block.nbytes)
    client.backend.release_va(va)
