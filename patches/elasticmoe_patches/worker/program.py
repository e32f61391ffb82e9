"""A worker that is a program of its own, not a fork of the IMM: `python -m elasticmoe_patches.worker.program`.

It takes the place of a forked child and keeps its pid, so that neither the IMM nor anybody else sees a difference but
the time. Standbys on NVIDIA GPUs are such programs, because SGLang's kernels initialise CUDA when they are imported and
CUDA does not survive a fork.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.imm.server import StandbyChannel
from elasticmoe_sglang.runtime import current_runtime
from elasticmoe_sglang.wire import to_imm as m
from elasticmoe_sglang.worker.idle import ENV_DOORBELLS


def become_standby(channel: StandbyChannel) -> NoReturn:
    """In the forked child: a program that imports what a rank needs and then waits at the channel."""
    exec_worker("elasticmoe_patches.worker.program", channel)


def never_here(channel: StandbyChannel, enter: m.Enter) -> int:
    """For an IMM whose children are all programs of their own."""
    raise WorkerError("a forked child was put into a rank", rank=enter.rank)


def exec_worker(module: str, channel: StandbyChannel, *fds: int) -> NoReturn:
    """Go on as `python -m module CHANNEL FD…`, with these descriptors and the doorbells kept open."""
    bells = [int(fd) for fd in os.environ[ENV_DOORBELLS].split(",")]
    for fd in (channel.sock.fileno(), *fds, *bells):
        os.set_inheritable(fd, True)
    program = [sys.executable, "-m", module, str(channel.sock.fileno()), *map(str, fds)]
    os.execv(program[0], program)


def main() -> None:
    serve(StandbyChannel(socket.socket(fileno=int(sys.argv[1]))))


def serve(channel: StandbyChannel, enter: m.Enter | None = None) -> None:
    """Import what a rank needs and run it, in the rank that `enter` or, later, the channel assigns. Returns only where
    the IMM has gone before that."""
    from elasticmoe_patches.imm import preload

    preload()
    _warm_device()
    from elasticmoe_patches.worker.worker import worker_main

    if enter is None:
        enter = channel.wait_to_enter()
    if enter is None:
        return
    status = worker_main(channel, enter)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as a forked rank ends: threads of SGLang and of the driver are not waited for


def _warm_device() -> None:
    """The GPU's context, where there is only one GPU on which this standby can be needed."""
    from elasticmoe_patches.device import on_cuda

    runtime = current_runtime()
    assert runtime is not None
    if on_cuda() and runtime.config.num_devices == 1:
        import torch

        torch.zeros(1, device="cuda:0")


if __name__ == "__main__":
    main()
