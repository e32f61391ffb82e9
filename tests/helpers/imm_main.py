"""An IMM whose ranks are small programs, for tests of the IMM itself: the same server, no SGLang.

Arguments: the socket, the lifeline, the number of standbys and, for standbys that become ready late, a folder: each
waits there for a file with its pid as name. `thread=NAME` in its place: this process has a thread of that name, with
which it may fork if the name begins with "safe".
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from pathlib import Path

from elasticmoe_sglang.imm import server
from elasticmoe_sglang.imm.server import StandbyChannel
from elasticmoe_sglang.lifeline import leave_signals_to_main, tie
from elasticmoe_sglang.wire.to_worker import Enter


def worker_main(channel: StandbyChannel, enter: Enter) -> int:
    """The launch arguments are the program: exit:N, hang, raise, quit (SIGQUIT to the parent, as SGLang does)."""
    order = enter.arguments.decode()
    change = enter.join_spec.operation_id
    facts = {"order": order, "change": change, "ppid": os.getppid(), "collectable": len(gc.get_objects())}
    channel.note(enter.join_spec.rank, json.dumps(facts).encode())
    if order.startswith("exit:"):
        return int(order.removeprefix("exit:"))
    if order == "raise":
        raise RuntimeError("this rank fails")
    if order == "quit":
        os.kill(os.getppid(), 3)
        return 7
    time.sleep(600)
    return 0


def become_late(_channel: StandbyChannel) -> None:
    while not os.path.exists(os.path.join(sys.argv[4], str(os.getpid()))):
        time.sleep(0.01)


def start_thread(name: str) -> None:
    named = threading.Event()

    def run() -> None:
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name)
        named.set()
        time.sleep(600)

    threading.Thread(target=run, daemon=True).start()
    named.wait()


if __name__ == "__main__":
    leave_signals_to_main()
    tie(sys.argv[2])
    server._SEND_S = 0.5
    late = None
    if len(sys.argv) > 4:
        what, _, thread = sys.argv[4].partition("=")
        if what == "thread":
            start_thread(thread)
        else:
            late = become_late
    server.ImmServer(
        sys.argv[1],
        worker_main,
        standbys=int(sys.argv[3]),
        capacity=4,
        lifeline=sys.argv[2],
        become=late,
        fork_safe_threads=("safe",),
    ).serve()
