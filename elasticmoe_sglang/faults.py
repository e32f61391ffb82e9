"""Points at which a test can make a fault happen in the real server. Inert unless the launch asked for it.

With ELASTICMOE_FAULTS=1 a process that reaches a named point looks for the file `fault` in the run folder. If its text
is `POINT RANK ACTION` with this point and this rank, the file is removed and the action is done, so it happens once:

    self            kill this process (SIGKILL)
    kill:PID        kill another process, and go on
    stall:SECONDS   stand still
    raise           raise FaultInjected
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from elasticmoe_sglang.errors import ElasticMoEError

ENV_FAULTS = "ELASTICMOE_FAULTS"
FAULT_FILE = "fault"

POINTS = (
    "boot.attached",  # a joining rank has mapped its weights
    "boot.barrier",  # a joining rank is about to wait at the commit barrier
    "pull.started",  # a survivor has begun to take columns over
    "pull.done",
    "commit.received",  # the commit was read from SGLang's broadcast
    "barrier.before",
    "barrier.after",
    "retire.sending",  # a retiring rank is about to send its requests
    "retire.sent",
    "hot.joining",  # a hot standby was told to join, and has its columns
    "hot.parking",  # a rank that has retired is about to become a hot standby
    "spread.given",  # a rank has given up waiting requests for a joining one, and not said so yet
    "resume.before",  # a survivor is about to resume a retiring rank's requests
)


class FaultInjected(ElasticMoEError):
    """A test asked for it."""


def point(name: str, rank: int, run_dir: Path) -> None:
    """Do what a test asked for at this point and rank, once; nothing otherwise."""
    if not os.environ.get(ENV_FAULTS):
        return
    assert name in POINTS, name
    path = run_dir / FAULT_FILE
    try:
        wanted, wanted_rank, action = path.read_text().split()
    except (FileNotFoundError, ValueError):
        return
    if wanted != name or int(wanted_rank) != rank:
        return
    path.unlink(missing_ok=True)
    _act(action, name, rank)


def _act(action: str, name: str, rank: int) -> None:
    kind, _, value = action.partition(":")
    if kind == "self":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "kill":
        os.kill(int(value), signal.SIGKILL)
    elif kind == "stall":
        time.sleep(float(value))
    else:
        raise FaultInjected(f"injected at {name}", rank=rank)
