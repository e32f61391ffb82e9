"""A joining rank without a standby: `python -m benchmarks.scaling.ablation.standby`, in place of a forked child."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable

from elasticmoe_patches.worker.program import exec_worker, serve
from elasticmoe_sglang.imm.server import StandbyChannel
from elasticmoe_sglang.wire import to_imm as m
from elasticmoe_sglang.wire.join_spec import decode_join_spec

WorkerMain = Callable[[StandbyChannel, m.Enter], int]


def fresh(worker_main: WorkerMain) -> WorkerMain:
    """In the forked child: the server's first ranks run as ever, a joining rank becomes a program of its own."""

    def main(channel: StandbyChannel, enter: m.Enter) -> int:
        if not decode_join_spec(enter.join_spec).joining_rank:
            return worker_main(channel, enter)
        frame_fd = os.memfd_create("enter", 0)
        os.write(frame_fd, m.encode(enter))
        os.lseek(frame_fd, 0, os.SEEK_SET)
        exec_worker(__name__, channel, frame_fd)

    return main


def main() -> None:
    channel, frame_fd = StandbyChannel(socket.socket(fileno=int(sys.argv[1]))), int(sys.argv[2])
    enter = m.decode(os.read(frame_fd, m.MAX_FRAME))
    os.close(frame_fd)
    assert isinstance(enter, m.Enter)
    serve(channel, enter)


if __name__ == "__main__":
    main()
