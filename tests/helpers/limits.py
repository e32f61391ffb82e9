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
    with _in_group("memory", pid, name) as group:
        limit = group / "memory.max"
        limit = limit if limit.exists() else group / "memory.limit_in_bytes"
        with contextlib.suppress(OSError):  # refused where not even pages of files can be dropped to reach it
            limit.write_text(str(1 << 20))
        yield


@contextlib.contextmanager
def no_more_processes(pid: int, name: str) -> Iterator[None]:
    """The process cannot fork inside the block. Skips the test where no control group can be made."""
    with _in_group("pids", pid, name) as group:
        (group / "pids.max").write_text("1")
        yield


@contextlib.contextmanager
def _in_group(controller: str, pid: int, name: str) -> Iterator[Path]:
    parent = _own_group(controller)
    group = parent / name
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield group
    finally:
        for member in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                (parent / "cgroup.procs").write_text(member)
        with contextlib.suppress(OSError):  # a member that has ended is counted for a moment
            group.rmdir()


def _own_group(controller: str) -> Path:
    """Of version 1, where the controller has a tree of its own, or of version 2."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return Path(f"/sys/fs/cgroup/{controller}{path}")
    unified = Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)[2]
    return Path(f"/sys/fs/cgroup{unified}")
