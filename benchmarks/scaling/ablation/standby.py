"""A joining rank without a standby: `python -m benchmarks.scaling.ablation.standby`, in place of a forked child."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

from elasticmoe_patches.worker.program import exec_worker, serve
from elasticmoe_sglang.imm.server import StandbyChannel
from elasticmoe_sglang.wire.seqpacket import MAX_PACKET_BYTES
from elasticmoe_sglang.wire.to_worker import ENTER, Enter

WorkerMain = Callable[[StandbyChannel, Enter], int]


def fresh(worker_main: WorkerMain) -> WorkerMain:
    """In the forked child: the server's first ranks run as ever, a joining rank becomes a program of its own."""

    def main(channel: StandbyChannel, enter: Enter) -> int:
        if not enter.join_spec.joining_rank:
            return worker_main(channel, enter)
        frame_fd = os.memfd_create("enter", 0)
        os.write(frame_fd, ENTER.pack(enter))
        os.lseek(frame_fd, 0, os.SEEK_SET)
        exec_worker(__name__, channel, frame_fd)

    return main


def main() -> None:
    channel, frame_fd = StandbyChannel(socket.socket(fileno=int(sys.argv[1]))), int(sys.argv[2])
    enter = ENTER.unpack(os.read(frame_fd, MAX_PACKET_BYTES))
    os.close(frame_fd)
    serve(channel, enter)


if __name__ == "__main__":
    main()
