"""A worker that is a program of its own, not a fork of the IMM: `python -m elasticmoe_patches.worker.program`.

It takes the place of a forked child and keeps its pid, so that neither the IMM nor anybody else sees a difference but
the time. Two uses: standbys on NVIDIA GPUs, because SGLang's kernels initialise CUDA when they are imported and CUDA
does not survive a fork; and a joining rank without a standby, for the ablation of that name.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NoReturn

from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.imm.server import StandbyChannel
from elasticmoe_sglang.runtime import current_runtime
from elasticmoe_sglang.wire.seqpacket import MAX_PACKET_BYTES
from elasticmoe_sglang.wire.to_worker import ENTER, Enter
from elasticmoe_sglang.worker.idle import ENV_DOORBELLS


def become_standby(channel: StandbyChannel) -> NoReturn:
    """In the forked child: a program that imports what a rank needs and then waits at the channel."""
    _become(channel, [])


def never_here(channel: StandbyChannel, enter: Enter) -> int:
    """For an IMM whose children are all programs of their own."""
    raise WorkerError("a forked child was put into a rank", rank=enter.join_spec.rank)


def fresh_worker_main(channel: StandbyChannel, enter: Enter) -> int:
    """In the forked child: the server's first ranks run as ever, a joining rank becomes a program of its own."""
    from elasticmoe_patches.worker.worker import worker_main

    if not enter.join_spec.joining_rank:
        return worker_main(channel, enter)
    frame_fd = os.memfd_create("enter", 0)
    os.write(frame_fd, ENTER.pack(enter))
    os.lseek(frame_fd, 0, os.SEEK_SET)
    _become(channel, [frame_fd])


def _become(channel: StandbyChannel, frames: list[int]) -> NoReturn:
    bells = [int(fd) for fd in os.environ[ENV_DOORBELLS].split(",")]
    for fd in (channel.sock.fileno(), *frames, *bells):
        os.set_inheritable(fd, True)
    program = [sys.executable, "-m", "elasticmoe_patches.worker.program", str(channel.sock.fileno()), *map(str, frames)]
    os.execv(program[0], program)


def main() -> None:
    channel = StandbyChannel(socket.socket(fileno=int(sys.argv[1])))
    enter: Enter | None = None
    if len(sys.argv) > 2:
        frame_fd = int(sys.argv[2])
        enter = ENTER.unpack(os.read(frame_fd, MAX_PACKET_BYTES))
        os.close(frame_fd)
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
