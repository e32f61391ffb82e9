"""An IMM whose seats are small programs, for tests of the IMM itself: same zygote, no SGLang."""

from __future__ import annotations

import gc
import json
import os
import sys
import time

from elasticmoe_sglang.imm.messages import Enter
from elasticmoe_sglang.imm.zygote import StandbyChannel, Zygote, die_with_parent


def seat_main(channel: StandbyChannel, enter: Enter) -> int:
    """`ticket` is the program: exit:N, hang, raise, quit (SIGQUIT to the parent, as SGLang does)."""
    order = enter.ticket.decode()
    facts = {"blob": enter.blob.decode(), "ppid": os.getppid(), "collectable": len(gc.get_objects())}
    channel.note(enter.seat, json.dumps(facts).encode())
    if order.startswith("exit:"):
        return int(order.removeprefix("exit:"))
    if order == "raise":
        raise RuntimeError("this seat fails")
    if order == "quit":
        os.kill(os.getppid(), 3)
        return 7
    time.sleep(600)
    return 0


if __name__ == "__main__":
    die_with_parent()
    Zygote(sys.argv[1], seat_main, standbys=int(sys.argv[2]), capacity=4).serve()
