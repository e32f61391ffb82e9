"""How many descriptors this process may still open.

Processes that listen with ZMQ at an ipc endpoint keep some: libzmq aborts the process when it accepts a connection and
has no descriptor for it (`ipc_listener.cpp`; its TCP listener lets the connection wait).
"""

from __future__ import annotations

import os
import resource

RESERVE = 32
"""For connections that ZMQ accepts."""


def descriptors_left() -> int:
    """What the soft limit leaves beyond those that are open and RESERVE; negative when these are not left either."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return soft - len(os.listdir("/proc/self/fd")) - RESERVE
    except OSError:  # none to list them with
        return -RESERVE
