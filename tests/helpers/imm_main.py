"""An IMM whose ranks are small programs, for tests of the IMM itself: same zygote, no SGLang."""

from __future__ import annotations

import gc
import json
import os
import sys
import time

from elasticmoe_sglang.imm.server import ImmServer, StandbyChannel, die_with_parent
from elasticmoe_sglang.wire.to_imm import Enter


def worker_main(channel: StandbyChannel, enter: Enter) -> int:
    """`join_spec` is the program: exit:N, hang, raise, quit (SIGQUIT to the parent, as SGLang does)."""
    order = enter.join_spec.decode()
    facts = {"blob": enter.blob.decode(), "ppid": os.getppid(), "collectable": len(gc.get_objects())}
    channel.note(enter.rank, json.dumps(facts).encode())
    if order.startswith("exit:"):
        return int(order.removeprefix("exit:"))
    if order == "raise":
        raise RuntimeError("this rank fails")
    if order == "quit":
        os.kill(os.getppid(), 3)
        return 7
    time.sleep(600)
    return 0


if __name__ == "__main__":
    die_with_parent()
    ImmServer(sys.argv[1], worker_main, standbys=int(sys.argv[2]), capacity=4).serve()
