"""Another IMM that has its imports behind it, for the moment when the IMM dies.

Until then it is a process that waits at a pipe. It has no socket and no child, so nothing is lost with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
from collections.abc import Callable

logger = logging.getLogger(__name__)

_NOW = b"!"


def told_to_serve(fd: int) -> bool:
    """In the spare: wait until it is needed; False when it never will be."""
    try:
        return os.read(fd, 1) == _NOW
    finally:
        os.close(fd)


class SpareImm:
    """Not thread-safe.

    Args:
        start: starts the process, which calls `told_to_serve` with the descriptor that it is given.
    """

    def __init__(self, start: Callable[[int], subprocess.Popen[bytes]]) -> None:
        self._start = start
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1

    @property
    def pid(self) -> int | None:
        """Of the one that waits."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def prepare(self) -> None:
        """Start one, unless one waits. Raises OSError where the system has no room for it."""
        if self.pid is not None:
            return
        self.dismiss()
        there, here = os.pipe()
        try:
            self._process, self._pipe = self._start(there), here
        except BaseException:
            os.close(here)
            raise
        finally:
            os.close(there)

    def take(self) -> subprocess.Popen[bytes] | None:
        """The one that waits serves from now on, as soon as it has imported. None: there is none."""
        process, self._process = self._process, None
        if process is None:
            return None
        try:
            if process.poll() is None and os.write(self._pipe, _NOW):
                return process
        except BrokenPipeError:
            process.wait()
        finally:
            os.close(self._pipe)
        logger.warning("the spare IMM (pid %d) has ended with status %s", process.pid, process.returncode)
        return None

    def dismiss(self) -> None:
        """The one that waits ends."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                os.close(self._pipe)
            if process.poll() is None:
                process.kill()
            process.wait()
