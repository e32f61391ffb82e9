"""A joiner without a standby, for the ablation of that name: a new interpreter that has imported nothing.

`python -m elasticmoe_patches.fresh_seat CHANNEL_FD FRAME_FD` takes the place of a forked child and keeps its pid, so
that neither the IMM nor anybody else sees a difference but the time.
"""

from __future__ import annotations

import os
import socket
import sys

from elasticmoe_sglang.imm import messages as m
from elasticmoe_sglang.imm.zygote import StandbyChannel
from elasticmoe_sglang.seats.idle import ENV_DOORBELLS
from elasticmoe_sglang.seats.ticket import decode_ticket


def fresh_seat_main(channel: StandbyChannel, enter: m.Enter) -> int:
    """In the forked child: the server's first seats run as ever, a joiner becomes a program of its own."""
    from elasticmoe_patches.seat import seat_main

    if not decode_ticket(enter.ticket).joiner:
        return seat_main(channel, enter)
    frame_fd = os.memfd_create("enter", 0)
    os.write(frame_fd, m.encode(enter))
    os.lseek(frame_fd, 0, os.SEEK_SET)
    bells = [int(fd) for fd in os.environ[ENV_DOORBELLS].split(",")]
    for fd in (channel.sock.fileno(), frame_fd, *bells):
        os.set_inheritable(fd, True)
    program = [sys.executable, "-m", "elasticmoe_patches.fresh_seat", str(channel.sock.fileno()), str(frame_fd)]
    os.execv(program[0], program)


def main() -> None:
    channel = StandbyChannel(socket.socket(fileno=int(sys.argv[1])))
    frame_fd = int(sys.argv[2])
    enter = m.decode(os.read(frame_fd, m.MAX_FRAME))
    os.close(frame_fd)
    assert isinstance(enter, m.Enter)
    from elasticmoe_patches.imm import preload

    preload()
    from elasticmoe_patches.seat import seat_main

    sys.exit(seat_main(channel, enter))


if __name__ == "__main__":
    main()
