"""Real seat processes with windows of device memory, over a real HMM: on a GPU, or on the CPU in Triton's interpreter.

Workers are spawned, never forked: neither CUDA nor the choice between Triton's compiler and interpreter survives that.
"""

from __future__ import annotations

import faulthandler
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from elasticmoe_kernels.triton.collectives import Group
from elasticmoe_kernels.triton.windows import WindowLayout
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.hmm.protocol import HmmStatus
from elasticmoe_sglang.seats.cuda_fabric import CudaFabric
from elasticmoe_sglang.seats.fabric import Fabric
from elasticmoe_sglang.seats.membership import Membership


def make_interpreter_ready() -> None:
    """For TRITON_INTERPRET=1: the mended interpreter, with the host's clock for the device's."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    from elasticmoe_kernels.triton import meet
    from tests.helpers.triton_interpreter import mend_interpreter

    def clock() -> tl.tensor:
        return tl.tensor(TensorHandle(np.array([time.monotonic_ns()], dtype=np.int64), tl.int64), tl.int64)

    mend_interpreter()
    meet.globaltimer = clock


@dataclass(kw_only=True)
class DeviceContext:
    """What a function that runs in a worker gets first. everybody: the group of all seats."""

    fabric: Fabric
    seat: int
    device: CudaFabric
    client: HmmClient
    everybody: Group

    def adopt(self, seats: tuple[int, ...], epoch: int) -> None:
        """Take part in this membership, unless the process is in it already."""
        if self.fabric.epoch != epoch or self.fabric.members != seats:
            self.fabric.set_membership(Membership(seats=seats, epoch=epoch, capacity=self.fabric.capacity))


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A function that raised in its worker, or a worker that did not start."""

    trace: str


def _serve(
    path: str, seat: int, device: int, timeout_s: float, endpoint: str, layout: WindowLayout, pipe: Connection
) -> None:
    faulthandler.register(signal.SIGUSR1)
    try:
        context = _sit_down(path, seat, device, timeout_s, endpoint, layout)
        pipe.send("ready")
    except Exception:
        pipe.send(Failed(trace=traceback.format_exc()))
        return
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(context, *args))
        except Exception:
            pipe.send(Failed(trace=traceback.format_exc()))


def _sit_down(
    path: str, seat: int, device: int, timeout_s: float, endpoint: str, layout: WindowLayout
) -> DeviceContext:
    import torch

    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        make_interpreter_ready()
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    fabric = Fabric(descriptor, seat, timeout_s=timeout_s)
    os.close(descriptor)
    fabric.register()
    client = HmmClient(endpoint, name=f"seat-{seat}", timeout_s=20)
    if client.backend.name == "cuda":
        torch.cuda.set_device(device)
    windows = CudaFabric(client, fabric, device=device, layout=layout)
    everybody = windows.group(tuple(range(fabric.capacity)))
    return DeviceContext(fabric=fabric, seat=seat, device=windows, client=client, everybody=everybody)


class DevicePool:
    """Args:
    capacity: seats; a worker is started in each of `seats` (all by default).
    folder: for the HMM's sockets; a short path.
    backend: of the HMM: "cuda", or "cpu" for the interpreter.
    layout: of the windows.
    timeout_s: the fabric's deadline for a late member.
    budget: bytes of each of the HMM's devices.
    seats_per_device: seat i sits on device i // this; None puts all on device 0.
    """

    def __init__(
        self,
        capacity: int,
        *,
        folder: Path,
        backend: str,
        layout: WindowLayout,
        seats: Iterable[int] | None = None,
        timeout_s: float = 20.0,
        budget: int = 1 << 30,
        seats_per_device: int | None = None,
    ) -> None:
        self.capacity = capacity
        self.epoch = 0
        self._layout = layout
        self._timeout_s = timeout_s
        self._spawn = mp.get_context("spawn")
        self._workers: dict[int, tuple[Any, Connection]] = {}
        self.fd = os.memfd_create("elasticmoe-test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, Fabric.region_bytes(capacity, 2, 1 << 16))
        self.control = Fabric.format(self.fd, capacity=capacity, channels=2, window_bytes=1 << 16)
        self._seats_per_device = seats_per_device or capacity
        budgets = [budget] * (1 + (capacity - 1) // self._seats_per_device)
        self.hmm = spawn_hmm(f"ipc://{folder}/hmm.sock", budgets, backend=backend, log_path=folder / "hmm.log")
        try:
            for seat in range(capacity) if seats is None else seats:
                self.start(seat, wait=False)
            for seat in self._workers:
                self._await_start(seat)
        except BaseException:
            self.close()
            raise

    def start(self, seat: int, *, wait: bool = True) -> None:
        """Put a fresh process into a seat."""
        ours, theirs = self._spawn.Pipe()
        path = f"/proc/{os.getpid()}/fd/{self.fd}"
        device = seat // self._seats_per_device
        arguments = (path, seat, device, self._timeout_s, self.hmm.endpoint, self._layout, theirs)
        process = self._spawn.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._workers[seat] = (process, ours)
        if wait:
            self._await_start(seat)

    def _await_start(self, seat: int) -> None:
        answer = self.result(seat)
        if isinstance(answer, Failed):
            raise AssertionError(f"seat {seat} did not start:\n{answer.trace}")

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def submit(self, seat: int, function: Callable[..., Any], *args: Any) -> None:
        """Start a function in a worker; `result` waits for it."""
        self._workers[seat][1].send((function, args))

    def result(self, seat: int, timeout_s: float = 45.0) -> Any:
        """What the function returned, or `Failed`."""
        pipe = self._workers[seat][1]
        if not pipe.poll(timeout_s):
            for process, _ in self._workers.values():
                os.kill(process.pid, signal.SIGUSR1)  # they say where they are
            raise TimeoutError(f"seat {seat} did not answer within {timeout_s} s")
        return pipe.recv()

    def run(self, seats: Iterable[int], function: Callable[..., Any], *args: Any) -> dict[int, Any]:
        """Run a function in several workers at once; raises when one of them failed."""
        seats = tuple(seats)
        for seat in seats:
            self.submit(seat, function, *args)
        results = {seat: self.result(seat) for seat in seats}
        failed = [f"seat {seat}:\n{r.trace}" for seat, r in results.items() if isinstance(r, Failed)]
        assert not failed, f"{function.__name__}{args} failed\n" + "\n".join(failed)
        return results

    def status(self) -> HmmStatus:
        with HmmClient(self.hmm.endpoint, name="test") as client:
            return client.status()

    def kill(self, seat: int) -> None:
        """SIGKILL, and wait until it is gone."""
        process, pipe = self._workers.pop(seat)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        pipe.close()

    def close(self) -> None:
        for seat in tuple(self._workers):
            self.kill(seat)
        os.close(self.fd)
        self.hmm.stop()
