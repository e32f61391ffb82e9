"""Real rank processes with windows of device memory, over a real HMM: on a GPU, or on the CPU in Triton's interpreter.

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
from elasticmoe_sglang.comm.cuda_region import CudaRegion
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.wire.to_hmm import HmmStatus


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
    """What a function that runs in a worker gets first. everybody: the group of all ranks."""

    region: CollectiveRegion
    rank: int
    device: CudaRegion
    client: HmmClient
    everybody: Group

    def adopt(self, ranks: tuple[int, ...], epoch: int) -> None:
        """Take part in this membership, unless the process is in it already."""
        if self.region.epoch != epoch or self.region.members != ranks:
            self.region.set_membership(Membership(ranks=ranks, epoch=epoch, capacity=self.region.capacity))


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A function that raised in its worker, or a worker that did not start."""

    trace: str


def _serve(
    path: str, rank: int, device: int, timeout_s: float, endpoint: str, layout: WindowLayout, pipe: Connection
) -> None:
    faulthandler.register(signal.SIGUSR1)
    try:
        context = _sit_down(path, rank, device, timeout_s, endpoint, layout)
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
    path: str, rank: int, device: int, timeout_s: float, endpoint: str, layout: WindowLayout
) -> DeviceContext:
    import torch

    torch.set_num_threads(1)
    if os.environ.get("TRITON_INTERPRET") == "1":
        make_interpreter_ready()
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    region = CollectiveRegion(descriptor, rank, timeout_s=timeout_s)
    os.close(descriptor)
    region.register()
    client = HmmClient(endpoint, name=f"rank-{rank}", timeout_s=20)
    if client.backend.name == "cuda":
        torch.cuda.set_device(device)
    windows = CudaRegion(client, region, device=device, layout=layout)
    everybody = windows.group(tuple(range(region.capacity)))
    return DeviceContext(region=region, rank=rank, device=windows, client=client, everybody=everybody)


class DevicePool:
    """Args:
    capacity: ranks; a worker is started in each of `ranks` (all by default).
    folder: for the HMM's sockets; a short path.
    backend: of the HMM: "cuda", or "cpu" for the interpreter.
    layout: of the windows.
    timeout_s: the collective region's deadline for a late member.
    budget: bytes of each of the HMM's devices.
    ranks_per_device: rank i is on device i // this; None puts all on device 0.
    """

    def __init__(
        self,
        capacity: int,
        *,
        folder: Path,
        backend: str,
        layout: WindowLayout,
        ranks: Iterable[int] | None = None,
        timeout_s: float = 20.0,
        budget: int = 1 << 30,
        ranks_per_device: int | None = None,
    ) -> None:
        self.capacity = capacity
        self.epoch = 0
        self._layout = layout
        self._timeout_s = timeout_s
        self._spawn = mp.get_context("spawn")
        self._workers: dict[int, tuple[Any, Connection]] = {}
        self.fd = os.memfd_create("elasticmoe-test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, CollectiveRegion.region_bytes(capacity, 2, 1 << 16))
        self.control = CollectiveRegion.format(self.fd, capacity=capacity, channels=2, window_bytes=1 << 16)
        self._ranks_per_device = ranks_per_device or capacity
        budgets = [budget] * (1 + (capacity - 1) // self._ranks_per_device)
        self.hmm = spawn_hmm(f"ipc://{folder}/hmm.sock", budgets, backend=backend, log_path=folder / "hmm.log")
        try:
            for rank in range(capacity) if ranks is None else ranks:
                self.start(rank, wait=False)
            for rank in self._workers:
                self._await_start(rank)
        except BaseException:
            self.close()
            raise

    def start(self, rank: int, *, wait: bool = True) -> None:
        """Put a fresh process into a rank."""
        ours, theirs = self._spawn.Pipe()
        path = f"/proc/{os.getpid()}/fd/{self.fd}"
        device = rank // self._ranks_per_device
        arguments = (path, rank, device, self._timeout_s, self.hmm.endpoint, self._layout, theirs)
        process = self._spawn.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        self._workers[rank] = (process, ours)
        if wait:
            self._await_start(rank)

    def _await_start(self, rank: int) -> None:
        answer = self.result(rank)
        if isinstance(answer, Failed):
            raise AssertionError(f"rank {rank} did not start:\n{answer.trace}")

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    def submit(self, rank: int, function: Callable[..., Any], *args: Any) -> None:
        """Start a function in a worker; `result` waits for it."""
        self._workers[rank][1].send((function, args))

    def result(self, rank: int, timeout_s: float = 45.0) -> Any:
        """What the function returned, or `Failed`."""
        pipe = self._workers[rank][1]
        if not pipe.poll(timeout_s):
            for process, _ in self._workers.values():
                os.kill(process.pid, signal.SIGUSR1)  # they say where they are
            raise TimeoutError(f"rank {rank} did not answer within {timeout_s} s")
        return pipe.recv()

    def run(self, ranks: Iterable[int], function: Callable[..., Any], *args: Any) -> dict[int, Any]:
        """Run a function in several workers at once; raises when one of them failed."""
        ranks = tuple(ranks)
        for rank in ranks:
            self.submit(rank, function, *args)
        results = {rank: self.result(rank) for rank in ranks}
        failed = [f"rank {rank}:\n{r.trace}" for rank, r in results.items() if isinstance(r, Failed)]
        assert not failed, f"{function.__name__}{args} failed\n" + "\n".join(failed)
        return results

    def status(self) -> HmmStatus:
        with HmmClient(self.hmm.endpoint, name="test") as client:
            return client.status()

    def kill(self, rank: int) -> None:
        """SIGKILL, and wait until it is gone."""
        process, pipe = self._workers.pop(rank)
        os.kill(process.pid, signal.SIGKILL)
        process.join(10)
        pipe.close()

    def close(self) -> None:
        for rank in tuple(self._workers):
            self.kill(rank)
        os.close(self.fd)
        self.hmm.stop()
