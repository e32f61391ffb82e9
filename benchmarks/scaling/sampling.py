"""Memory of a group of processes over time, the same way for every method."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from benchmarks.scaling.clock import Clock
from benchmarks.scaling.records import MemorySample


def process_tree(roots: Iterable[int]) -> list[int]:
    """The roots and all their living descendants."""
    found = []
    for root in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(root)
            found += [root, *(child.pid for child in process.children(recursive=True))]
    return found


def proportional_bytes(pids: Iterable[int]) -> int:
    """Sum of the proportional set sizes; pages of memory files count, shared ones once over all that map them."""
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


async def sample_memory(
    roots: Callable[[], Iterable[int]], clock: Clock, interval_s: float, into: list[MemorySample]
) -> None:
    """Appends a sample every `interval_s` until it is cancelled. Walks page tables, so it runs in a thread."""
    while True:
        at = clock.now()
        into.append(MemorySample(at=at, host_bytes=await asyncio.to_thread(_measure, list(roots()))))
        await asyncio.sleep(max(0.0, interval_s - (clock.now() - at)))


def _measure(roots: list[int]) -> int:
    return proportional_bytes(process_tree(roots))
