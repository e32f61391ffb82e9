"""Removes a server's run folder when the server has ended, however it ended.

SGLang ends itself and its children with SIGKILL, so nothing in its process tree can clean up. This small process stands
outside the tree: `python -m elasticmoe_sglang.run_dir_reaper RUN_DIR PID` forks away, waits for PID and removes the
folder.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys


def watch(run_dir: str, pid: int) -> None:
    """Start the reaper for a folder that was made for the process `pid`."""
    subprocess.run(
        [sys.executable, "-m", "elasticmoe_sglang.run_dir_reaper", run_dir, str(pid)], check=True, timeout=30
    )


def main(arguments: list[str]) -> None:
    run_dir, pid = arguments[0], int(arguments[1])
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        shutil.rmtree(run_dir, ignore_errors=True)
        return
    # Twice, so that it is nobody's child: SGLang ends its own by walking the tree.
    if os.fork():
        return
    os.setsid()
    if os.fork():
        return
    _close_inherited(watched)
    select.select([watched], [], [])
    shutil.rmtree(run_dir, ignore_errors=True)


def _close_inherited(keep: int) -> None:
    """Holding a pipe or a log of the server open would keep its readers waiting."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd != keep:
            with contextlib.suppress(OSError):  # the listing's own descriptor
                os.close(fd)


if __name__ == "__main__":
    main(sys.argv[1:])
