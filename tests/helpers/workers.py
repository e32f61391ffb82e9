"""Real processes in the ranks of a test: started once, reused by many cases, killed and stopped at will.

Workers are forked from a server that has torch loaded already, as the ranks of a running server are.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.comm.region import CollectiveRegion

_PRELOAD = [
    "torch.distributed",
    "elasticmoe_sglang.comm.process_group",
    "tests.helpers.collective_cases",
    "tests.helpers.fault_cases",
    "tests.helpers.barrier_cases",
]


@dataclass(kw_only=True)
class WorkerContext:
    """What a function that runs in a worker gets first."""

    region: CollectiveRegion
    rank: int
    scratch: str
    memo: dict[Any, Any] = field(default_factory=dict)

    def adopt(self, ranks: tuple[int, ...], epoch: int) -> None:
        """Take part in this membership, unless the process is in it already."""
        if self.region.epoch != epoch or self.region.members != ranks:
            self.region.set_membership(Membership(ranks=ranks, epoch=epoch, capacity=self.region.capacity))


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A function that raised in its worker."""

    error: BaseException
    trace: str
    seconds: float


def _serve(
    path: str,
    rank: int,
    timeout_s: float,
    scratch: str,
    pipe: Connection,
    with_groups: bool,
    install: Callable[[CollectiveRegion], None] | None,
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    region = CollectiveRegion(descriptor, rank, timeout_s=timeout_s)
    os.close(descriptor)
    region.register()
    context = WorkerContext(region=region, rank=rank, scratch=scratch)
    if with_groups:
        from elasticmoe_sglang.comm.process_group import init_elastic

        if install is not None:
            install(region)
        init_elastic(region, rank, region.capacity)
        context.memo["group"] = dist.new_group(list(range(region.capacity)), backend="gloo")
    pipe.send(("ready", 0.0))
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        started = time.monotonic()
        try:
            result = function(context, *args, **kwargs)
        except Exception as error:
            result = Failed(error=error, trace=traceback.format_exc(), seconds=time.monotonic() - started)
        pipe.send((result, time.monotonic() - started))


class WorkerPool:
    """Args:
    capacity: ranks; a worker is started in each of `ranks` (all by default).
    timeout_s: the collective region's deadline for a late member.
    scratch: folder for what the workers share besides the collective region.
    with_groups: workers set up torch.distributed.
    install: called with each worker's region before that, to choose another type of group.
    """

    def __init__(
        self,
        capacity: int,
        *,
        scratch: str,
        ranks: Iterable[int] | None = None,
        timeout_s: float = 20.0,
        window_bytes: int = 1 << 20,
        channels: int = 6,
        with_groups: bool = True,
        install: Callable[[CollectiveRegion], None] | None = None,
    ) -> None:
        self.capacity = capacity
        self.scratch = scratch
        self.timeout_s = timeout_s
        self.with_groups = with_groups
        self._install = install
        self.epoch = 0
        self._last: tuple[int, ...] = ()
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self.fd = os.memfd_create("elasticmoe-test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, CollectiveRegion.region_bytes(capacity, channels, window_bytes))
        self.control = CollectiveRegion.format(self.fd, capacity=capacity, channels=channels, window_bytes=window_bytes)
        self.seconds: dict[int, float] = {}
        """How long the last function of each rank ran, measured there."""
        self._workers: dict[int, tuple[Any, Connection]] = {}
        for rank in range(capacity) if ranks is None else ranks:
            self.start(rank, wait=False)
        for rank in self._workers:
            self.result(rank)

    def start(self, rank: int, wait: bool = True) -> None:
        """Put a fresh process into a rank."""
        ours, theirs = self._context.Pipe()
        path = f"/proc/{os.getpid()}/fd/{self.fd}"
        process = self._context.Process(
            target=_serve,
            args=(path, rank, self.timeout_s, self.scratch, theirs, self.with_groups, self._install),
            daemon=True,
        )
        process.start()
        theirs.close()
        self._workers[rank] = (process, ours)
        if wait:
            self.result(rank)

    def next_epoch(self) -> int:
        self.epoch += 1
        self._last = ()
        return self.epoch

    def epoch_of(self, ranks: tuple[int, ...]) -> int:
        """The epoch that was last begun with these ranks, or a new one."""
        if self._last != ranks:
            self.next_epoch()
            self._last = ranks
        return self.epoch

    def submit(self, rank: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Start a function in a worker; `result` waits for it."""
        self._workers[rank][1].send((function, args, kwargs))

    def result(self, rank: int, timeout_s: float = 60.0) -> Any:
        """What the function returned, or `Failed`."""
        pipe = self._workers[rank][1]
        if not pipe.poll(timeout_s):
            raise TimeoutError(f"rank {rank} did not answer within {timeout_s} s")
        result, self.seconds[rank] = pipe.recv()
        return result

    def run(self, ranks: Iterable[int], function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[int, Any]:
        """Run a function in several workers at once; raises when one of them failed."""
        results = self.try_run(ranks, function, *args, **kwargs)
        failed = {rank: result for rank, result in results.items() if isinstance(result, Failed)}
        if failed:
            texts = "\n".join(f"rank {rank}:\n{result.trace}" for rank, result in failed.items())
            raise AssertionError(f"{function.__name__}{args} failed\n{texts}")
        return results

    def try_run(self, ranks: Iterable[int], function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[int, Any]:
        """The same; failures come back as `Failed`."""
        ranks = tuple(ranks)
        for rank in ranks:
            self.submit(rank, function, *args, **kwargs)
        return {rank: self.result(rank) for rank in ranks}

    def pid(self, rank: int) -> int:
        pid = self._workers[rank][0].pid
        assert pid is not None
        return pid

    def kill(self, rank: int) -> None:
        """SIGKILL, and wait until it is gone."""
        process, pipe = self._workers.pop(rank)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        pipe.close()

    def stop(self, rank: int) -> None:
        os.kill(self.pid(rank), signal.SIGSTOP)

    def resume(self, rank: int) -> None:
        os.kill(self.pid(rank), signal.SIGCONT)

    def close(self) -> None:
        for rank in tuple(self._workers):
            self.kill(rank)
        os.close(self.fd)
