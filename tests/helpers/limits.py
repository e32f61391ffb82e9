"""Limits that the kernel puts on a running process, and takes off again."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


@contextlib.contextmanager
def limited(pid: int, which: int, soft: int) -> Iterator[None]:
    """The process has at most this much of a resource (`resource.RLIMIT_…`) inside the block."""
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (soft, before[1]))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, which, before)


def descriptors(pid: int) -> int:
    """The highest descriptor in use, and one: with this as its limit, a process gets no further one."""
    return max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1


def address_space(pid: int) -> int:
    """Bytes that the process has mapped."""
    return psutil.Process(pid).memory_info().vms


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process is stopped inside the block, unless it is killed there."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def slowed(pid: int, *, runs_s: float, stops_s: float) -> Iterator[None]:
    """The process runs and stops in turn inside the block."""
    end = threading.Event()

    def toggle() -> None:
        while not end.is_set():
            with stopped(pid):
                end.wait(stops_s)
            end.wait(runs_s)

    thread = threading.Thread(target=toggle, name="slow")
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@contextlib.contextmanager
def out_of_memory(pid: int, name: str) -> Iterator[None]:
    """The process is in a control group that has less memory than it needs, so the kernel kills it. Skips the test
    where no control group can be made."""
    group, limit = _memory_group(name)
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    try:
        with contextlib.suppress(OSError):  # refused where not even pages of files can be dropped to reach it
            (group / limit).write_text(str(1 << 20))
        yield
    finally:
        with contextlib.suppress(OSError):
            group.rmdir()


def _memory_group(name: str) -> tuple[Path, str]:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory" + path) / name, "memory.limit_in_bytes"
    own = Path("/proc/self/cgroup").read_text().split(":", 2)[2].strip()
    return Path("/sys/fs/cgroup" + own) / name, "memory.max"
