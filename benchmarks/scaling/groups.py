"""A control group around a method's servers: the memory that they hold, at any rate, and the CPU time they used."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from benchmarks.scaling.clock import Clock
from benchmarks.scaling.records import MemorySample

ROOT = Path("/sys/fs/cgroup")
SAMPLES_PER_S = 50


class Group:
    """Version 1 and 2 of Linux's control groups; use as a context manager. Needs the right to make one (root).

    Memory is what processes hold, anonymous pages and shared memory, a shared page once. The page cache (a checkpoint
    that was read) is no part of it: the kernel gives it back when somebody needs it.

    Raises:
        OSError: this machine does not let this user make one.
    """

    def __init__(self, root: Path = ROOT) -> None:
        name = f"elasticmoe-bench-{os.getpid()}"
        if (root / "memory").is_dir():
            self._memory, self._cpu = root / "memory" / name, root / "cpuacct" / name
            self._fields = ("total_rss", "total_shmem")
        else:
            self._memory = self._cpu = root / name
            self._fields = ("anon", "shmem")

    def __enter__(self) -> Group:
        for folder in {self._memory, self._cpu}:
            folder.mkdir()
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + 10
        for folder in {self._memory, self._cpu}:
            # Processes that were killed leave a moment later.
            while (folder / "cgroup.procs").read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            folder.rmdir()

    def enter(self) -> None:
        """This process, and all that it starts, belong to it from now on."""
        for folder in {self._memory, self._cpu}:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    def memory_bytes(self) -> int:
        found = dict(line.split() for line in (self._memory / "memory.stat").read_text().splitlines())
        return sum(int(found[field]) for field in self._fields)

    def cpu_s(self) -> float:
        if (usage := self._cpu / "cpuacct.usage").exists():
            return int(usage.read_text()) / 1e9
        found = dict(line.split() for line in (self._cpu / "cpu.stat").read_text().splitlines())
        return int(found["usage_usec"]) / 1e6

    async def sample(self, clock: Clock, into: list[MemorySample]) -> None:
        """Appends `SAMPLES_PER_S` samples a second until it is cancelled."""
        while True:
            at = clock.now()
            into.append(MemorySample(at=at, host_bytes=self.memory_bytes()))
            await asyncio.sleep(max(0.0, at + 1 / SAMPLES_PER_S - clock.now()))


class CpuMeter:
    """Who used the machine's cores since it was made."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._began = self._read()

    def busy_cores(self) -> dict[str, float]:
        """CPU time a second of the servers, of this process (the client), of all others, and stolen by the host."""
        passed, servers, client, everything, stolen = (
            now - began for now, began in zip(self._read(), self._began, strict=True)
        )
        others = max(0.0, everything - servers - client)
        found = {"servers": servers, "client": client, "others": others, "stolen": stolen}
        return {name: round(spent / passed, 3) for name, spent in found.items()}

    def _read(self) -> tuple[float, ...]:
        user, nice, system, _, _, irq, softirq, stolen, *_ = (
            int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in Path("/proc/stat").read_text().split("\n")[0].split()[1:]
        )
        everything = user + nice + system + irq + softirq
        return time.monotonic(), self._group.cpu_s(), time.process_time(), everything, stolen
