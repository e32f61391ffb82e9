"""Which process of a rank is meant: one number for each boot, since a rank has several processes in a server's life."""

from __future__ import annotations


class Incarnations:
    """Attributes:
    gone: (rank, incarnation) of workers that have ended; their outputs do not count any more.
    """

    def __init__(self) -> None:
        self.gone: set[tuple[int, int]] = set()
        self._boots = 0
        self._of: dict[int, int] = {}  # pid -> incarnation, of workers that live

    def next(self) -> int:
        """For a worker that is about to boot. 0 is that of a rank's first worker, which boots with the server."""
        self._boots += 1
        return self._boots

    def assigned(self, pid: int, incarnation: int) -> None:
        """The IMM has put this process into a rank. What it says first holds: another IMM does not know."""
        self._of.setdefault(pid, incarnation)

    def exited(self, rank: int, pid: int) -> None:
        """By the process and not by the rank: the next one may have been asked for before this exit was reported."""
        self.gone.add((rank, self._of.pop(pid, 0)))
