"""Ends the processes of a server with its main process, however that ends, and whoever their parent is by then.

`PR_SET_PDEATHSIG` ends a process with its parent, and a worker's parent, the IMM, may end while the server goes on. So
the main process holds the writing end of a named pipe, and each other process opens a reading end of its own and asks
the kernel for SIGKILL when the last writer has gone. No thread has to run for that, and a process that is stopped or
busy ends too (docs/adr/0002-imm-forks.md).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1
_F_SETSIG = 10  # Linux, asm-generic/fcntl.h; Python's fcntl has no name for it
_ends: list[int] = []  # reading ends of this process: they are open until it ends


@dataclass
class Lifeline:
    """The main process's end: `Lifeline.hold(path)`. What is tied to it ends with `cut`, or with this process.

    Programs started from here do not inherit it. A child that is forked without one must `let_go`, or its own life
    counts as well.
    """

    path: str
    fd: int

    @classmethod
    def hold(cls, path: str) -> Lifeline:
        """Make the pipe (mode 0600) and hold it."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        os.mkfifo(path, 0o600)
        # For reading too: a pipe without a reader cannot be opened for writing only.
        return cls(path=path, fd=os.open(path, os.O_RDWR | os.O_NONBLOCK))

    def cut(self) -> None:
        """Kill every process that is tied to it."""
        self.let_go()

    def let_go(self) -> None:
        """In a fork of the main process: close it without an effect on others."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def tie(path: str) -> None:
    """Have the kernel kill this process when the lifeline at `path` is cut; at once where it is cut already.

    Holds across `execv`, and not across a fork: the child ties itself.
    """
    for inherited in _ends:
        os.close(inherited)
    _ends.clear()
    try:
        end = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:  # the run folder has gone with its server
        os.kill(os.getpid(), signal.SIGKILL)
        raise
    _ends.append(end)
    os.set_inheritable(end, True)
    fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(end, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
    with contextlib.suppress(BlockingIOError):  # there is a writer, and nothing to read
        os.read(end, 1)
        os.kill(os.getpid(), signal.SIGKILL)


def leave_signals_to_main() -> None:
    """Ctrl-C and a supervisor's SIGTERM may go to the whole process group, and running requests need this process until
    they end: when that is, the main process decides."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def die_with_parent() -> None:
    """For children of the main process: the kernel kills this process when its parent ends. Signals are left to it."""
    leave_signals_to_main()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
