"""What a test may not leave behind: open descriptors, files in /dev/shm, child processes."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SHM = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What a process holds at one moment."""

    descriptors: Counter[str]
    """What its descriptors point to, with how often each occurs."""
    shm_files: frozenset[str]
    """Names of all files of this user in /dev/shm, whoever made them."""
    children: frozenset[int]
    """Process ids of all its descendants that run; zombies count, since somebody forgot to wait for them."""

    def beyond(self, earlier: Holdings) -> list[str]:
        """What is held now and was not held earlier, one line each."""
        lines = [f"descriptor -> {name} (x{n})" for name, n in (self.descriptors - earlier.descriptors).items()]
        lines += [f"/dev/shm/{name}" for name in sorted(self.shm_files - earlier.shm_files)]
        return lines + [f"process {_describe(pid)}" for pid in sorted(self.children - earlier.children)]


def holdings(pid: int | None = None) -> Holdings:
    """What process `pid` (this one where None) holds now."""
    process = psutil.Process(pid)
    return Holdings(
        descriptors=Counter(_descriptors(process.pid)),
        shm_files=frozenset(_shm_files()),
        children=frozenset(child.pid for child in process.children(recursive=True)),
    )


@contextmanager
def no_leaks(pid: int | None = None, *, settle_s: float = 3.0) -> Iterator[None]:
    """Assert that process `pid` holds nothing at the end that it did not hold at the start.

    What goes away within `settle_s` seconds, such as a child that is just exiting, is no leak.
    """
    before = holdings(pid)
    yield
    deadline = time.monotonic() + settle_s
    while leaked := _leaked(before, pid):
        if time.monotonic() > deadline:
            raise AssertionError("left behind:\n  " + "\n  ".join(leaked))
        time.sleep(0.05)


def _leaked(before: Holdings, pid: int | None) -> list[str]:
    # What only a cycle of garbage holds is no leak; looking for it takes long, so only where something is left.
    if holdings(pid).beyond(before):
        gc.collect()
        return holdings(pid).beyond(before)
    return []


def _descriptors(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        try:
            link = os.readlink(f"{folder}/{name}")
        except FileNotFoundError:  # the one that listed the folder
            continue
        # Sockets and pipes are told apart by inode; a leak shows as one more of its sort.
        yield link.split(":")[0] if link.startswith(("socket:", "pipe:")) else link


def sockets(pid: int) -> list[str]:
    """Its sockets in whatever state, one line each: state, address, peer's address, and the peer's process where it is
    on this host. Empty without `ss` (Debian's iproute2)."""
    if shutil.which("ss") is None:
        return []
    options = ("--all", "--no-header", "--numeric", "--processes")
    lines = {
        family: subprocess.run(["ss", f"--{family}", *options], capture_output=True, text=True, check=True).stdout
        for family in ("unix", "tcp")
    }
    columns = [line.split() for line in lines["unix"].splitlines()]
    # netid, state, two queue lengths, path, inode, peer's path, peer's inode, processes
    owners = {each[5]: (each[4], each[8] if len(each) > 8 else "-") for each in columns}
    found = [
        f"{each[1]} {each[4]} -> {' '.join(owners.get(each[7], ('?', 'nobody')))}"
        for each in columns
        if len(each) > 8 and f"pid={pid}," in each[8]
    ]
    return sorted(found + [line for line in lines["tcp"].splitlines() if f"pid={pid}," in line])


def _shm_files() -> Iterator[str]:
    for path in SHM.iterdir():
        try:
            if path.stat().st_uid == os.getuid():
                yield path.name
        except FileNotFoundError:  # gone since it was listed
            continue


def _describe(pid: int) -> str:
    try:
        process = psutil.Process(pid)
        return f"{pid} ({process.status()}): {' '.join(process.cmdline())[:120]}"
    except psutil.NoSuchProcess:
        return f"{pid} (gone)"
