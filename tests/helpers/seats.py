"""Real processes in the seats of a test: started once, reused by many cases, killed and stopped at will.

Workers are forked from a server that has torch loaded already, as the seats of a running server are.
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

from elasticmoe_sglang.seats.fabric import Fabric
from elasticmoe_sglang.seats.membership import Membership

_PRELOAD = [
    "torch.distributed",
    "elasticmoe_sglang.seats.process_group",
    "tests.helpers.collective_cases",
    "tests.helpers.fault_cases",
    "tests.helpers.gate_cases",
]


@dataclass(kw_only=True)
class SeatContext:
    """What a function that runs in a worker gets first."""

    fabric: Fabric
    seat: int
    scratch: str
    memo: dict[Any, Any] = field(default_factory=dict)

    def adopt(self, seats: tuple[int, ...], epoch: int) -> None:
        """Take part in this membership, unless the process is in it already."""
        if self.fabric.epoch != epoch or self.fabric.members != seats:
            self.fabric.set_membership(Membership(seats=seats, epoch=epoch, capacity=self.fabric.capacity))


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A function that raised in its worker."""

    error: BaseException
    trace: str
    seconds: float


def _serve(path: str, seat: int, timeout_s: float, scratch: str, pipe: Connection, with_groups: bool) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    fabric = Fabric(descriptor, seat, timeout_s=timeout_s)
    os.close(descriptor)
    fabric.register()
    context = SeatContext(fabric=fabric, seat=seat, scratch=scratch)
    if with_groups:
        from elasticmoe_sglang.seats.process_group import init_elastic

        init_elastic(fabric, seat, fabric.capacity)
        context.memo["group"] = dist.new_group(list(range(fabric.capacity)), backend="gloo")
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


class SeatPool:
    """Args:
    capacity: seats; a worker is started in each of `seats` (all by default).
    timeout_s: the fabric's deadline for a late member.
    scratch: folder for what the workers share besides the fabric.
    with_groups: workers set up torch.distributed.
    """

    def __init__(
        self,
        capacity: int,
        *,
        scratch: str,
        seats: Iterable[int] | None = None,
        timeout_s: float = 20.0,
        window_bytes: int = 1 << 20,
        channels: int = 6,
        with_groups: bool = True,
    ) -> None:
        self.capacity = capacity
        self.scratch = scratch
        self.timeout_s = timeout_s
        self.with_groups = with_groups
        self.epoch = 0
        self._last: tuple[int, ...] = ()
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)
        self.fd = os.memfd_create("elasticmoe-test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, Fabric.region_bytes(capacity, channels, window_bytes))
        self.control = Fabric.format(self.fd, capacity=capacity, channels=channels, window_bytes=window_bytes)
        self.seconds: dict[int, float] = {}
        """How long the last function of each seat ran, measured there."""
        self._workers: dict[int, tuple[Any, Connection]] = {}
        for seat in range(capacity) if seats is None else seats:
            self.start(seat, wait=False)
        for seat in self._workers:
            self.result(seat)

    def start(self, seat: int, wait: bool = True) -> None:
        """Put a fresh process into a seat."""
        ours, theirs = self._context.Pipe()
        path = f"/proc/{os.getpid()}/fd/{self.fd}"
        process = self._context.Process(
            target=_serve, args=(path, seat, self.timeout_s, self.scratch, theirs, self.with_groups), daemon=True
        )
        process.start()
        theirs.close()
        self._workers[seat] = (process, ours)
        if wait:
            self.result(seat)

    def next_epoch(self) -> int:
        self.epoch += 1
        self._last = ()
        return self.epoch

    def epoch_of(self, seats: tuple[int, ...]) -> int:
        """The epoch that was last begun with these seats, or a new one."""
        if self._last != seats:
            self.next_epoch()
            self._last = seats
        return self.epoch

    def submit(self, seat: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Start a function in a worker; `result` waits for it."""
        self._workers[seat][1].send((function, args, kwargs))

    def result(self, seat: int, timeout_s: float = 60.0) -> Any:
        """What the function returned, or `Failed`."""
        pipe = self._workers[seat][1]
        if not pipe.poll(timeout_s):
            raise TimeoutError(f"seat {seat} did not answer within {timeout_s} s")
        result, self.seconds[seat] = pipe.recv()
        return result

    def run(self, seats: Iterable[int], function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[int, Any]:
        """Run a function in several workers at once; raises when one of them failed."""
        results = self.try_run(seats, function, *args, **kwargs)
        failed = {seat: result for seat, result in results.items() if isinstance(result, Failed)}
        if failed:
            texts = "\n".join(f"seat {seat}:\n{result.trace}" for seat, result in failed.items())
            raise AssertionError(f"{function.__name__}{args} failed\n{texts}")
        return results

    def try_run(self, seats: Iterable[int], function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[int, Any]:
        """The same; failures come back as `Failed`."""
        seats = tuple(seats)
        for seat in seats:
            self.submit(seat, function, *args, **kwargs)
        return {seat: self.result(seat) for seat in seats}

    def pid(self, seat: int) -> int:
        pid = self._workers[seat][0].pid
        assert pid is not None
        return pid

    def kill(self, seat: int) -> None:
        """SIGKILL, and wait until it is gone."""
        process, pipe = self._workers.pop(seat)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        pipe.close()

    def stop(self, seat: int) -> None:
        os.kill(self.pid(seat), signal.SIGSTOP)

    def resume(self, seat: int) -> None:
        os.kill(self.pid(seat), signal.SIGCONT)

    def close(self) -> None:
        for seat in tuple(self._workers):
            self.kill(seat)
        os.close(self.fd)
