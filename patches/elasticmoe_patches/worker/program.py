"""The worker's process: what a standby does once it is assigned a rank, as a fork of the IMM or a program of its own.

The program, `python -m elasticmoe_patches.worker.program`, replaces a forked child and keeps its pid, so that neither
the IMM nor anybody else sees a difference but the time. Standbys on Ascend NPUs are such programs, because SGLang's
imports initialise ACL, which does not survive a fork; on NVIDIA GPUs they are where an import needs CUDA. SGLang is
imported inside functions only: an IMM for such devices imports this module and not SGLang.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import sys
from typing import Any, NoReturn

from elasticmoe_patches.device import bind_rank, on_cuda, take_device
from elasticmoe_patches.plugin import install_for_process
from elasticmoe_patches.worker.preload import preload
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.imm.server import StandbyChannel
from elasticmoe_sglang.runtime import current_runtime
from elasticmoe_sglang.wire.to_coordinator import REPLICA_LOST
from elasticmoe_sglang.wire.to_worker import Enter
from elasticmoe_sglang.worker.idle import ENV_DOORBELLS

logger = logging.getLogger(__name__)


class ReadyPipe:
    """Replaces the pipe on which SGLang's scheduler reports that it is initialised."""

    def __init__(self, channel: StandbyChannel, rank: int) -> None:
        self._channel = channel
        self._rank = rank

    def send(self, info: dict[str, Any]) -> None:
        self._channel.note(self._rank, json.dumps(info, default=str).encode())


def worker_main(channel: StandbyChannel, enter: Enter) -> int:
    """Run SGLang's scheduler for this rank until it retires or the server is stopped.

    Returns:
        The process's exit status.

    Raises:
        WorkerError: the scheduler ended in another way.
    """
    from elasticmoe_patches.worker.replica import ReplicaLost
    from elasticmoe_patches.worker.worker import RankRetired, start_worker

    install_for_process("worker")
    from sglang.srt.managers.scheduler import run_scheduler_process

    from elasticmoe_patches.srt.managers.io_struct import register_types

    register_types()
    runtime = current_runtime()
    assert runtime is not None
    bind_rank(runtime.config, enter.join_spec.rank)
    take_device(runtime.config, enter.join_spec.rank)
    server_args, port_args, gpu_id = pickle.loads(enter.arguments)
    worker = start_worker(runtime, enter.join_spec)
    rank = worker.rank
    replica = runtime.config.replica_of(rank)
    try:
        run_scheduler_process(
            server_args,
            port_args,
            gpu_id,
            rank,
            0,
            replica,
            ReadyPipe(channel, rank),
            display_tp_rank=rank,
            display_dp_rank=replica,
            display_moe_ep_rank=rank,
        )
    except RankRetired:
        logger.info("rank %d has retired", rank)
        return 0
    except ReplicaLost:
        return REPLICA_LOST
    finally:
        worker.close()
    if worker.stopped:
        return 0
    raise WorkerError("the scheduler ended", rank=rank, hint="Its traceback is above")


def become_standby(channel: StandbyChannel) -> NoReturn:
    """In the forked child: run the program, which imports what a rank needs and then waits at the channel."""
    exec_worker("elasticmoe_patches.worker.program", channel)


def never_forked(channel: StandbyChannel, enter: Enter) -> int:
    """For an IMM whose children all become programs of their own."""
    raise WorkerError(
        "a forked child was assigned a rank for which a program of its own is needed", rank=enter.join_spec.rank
    )


def exec_worker(module: str, channel: StandbyChannel, *fds: int) -> NoReturn:
    """Become `python -m module CHANNEL FD…`, with these descriptors and the doorbells kept open."""
    bells = [int(fd) for fd in os.environ[ENV_DOORBELLS].split(",")]
    for fd in (channel.sock.fileno(), *fds, *bells):
        os.set_inheritable(fd, True)
    program = [sys.executable, "-m", module, str(channel.sock.fileno()), *map(str, fds)]
    os.execv(program[0], program)


def main() -> None:
    """The program; its argument is the descriptor of the channel."""
    serve(StandbyChannel(socket.socket(fileno=int(sys.argv[1]))))


def serve(channel: StandbyChannel, enter: Enter | None = None) -> None:
    """Import what a rank needs and serve the rank that `enter` or, later, the channel assigns. Returns only if the IMM
    is gone before that."""
    preload()
    warm_device()
    if enter is None:
        enter = channel.wait_to_enter()
    if enter is None:
        return
    status = worker_main(channel, enter)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # like a forked rank: threads of SGLang and of the driver are not waited for


def warm_device() -> None:
    """Create the GPU's context, where this standby can be needed on one GPU only."""
    runtime = current_runtime()
    assert runtime is not None
    if on_cuda() and runtime.config.num_devices == 1:
        import torch

        torch.zeros(1, device="cuda:0")


if __name__ == "__main__":
    main()
