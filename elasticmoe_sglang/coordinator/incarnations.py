"""Which process of a rank is meant: one number for each boot, since a rank has several processes in a server's life."""

from __future__ import annotations

import signal

from elasticmoe_sglang.wire.to_coordinator import REPLICA_LOST


class Incarnations:
    """Attributes:
    gone: (rank, incarnation) of workers that have ended; their outputs do not count any more.
    """

    def __init__(self) -> None:
        self.gone: set[tuple[int, int]] = set()
        self._boots = 0
        self._of: dict[int, int] = {}  # pid -> incarnation, of workers that live
        self._stalled: set[int] = set()
        self._crashed = False

    def next(self) -> int:
        """For a worker that is about to boot. 0 is that of a rank's first worker, which boots with the server."""
        self._boots += 1
        return self._boots

    def assigned(self, pid: int, incarnation: int) -> None:
        """The IMM has put this process into a rank. What it says first holds: another IMM does not know."""
        self._of.setdefault(pid, incarnation)

    def stalled(self, pid: int) -> None:
        """The coordinator ends this worker, because it stands still."""
        self._stalled.add(pid)

    def exited(self, rank: int, pid: int, status: int | None, *, serving: bool) -> None:
        """By the process and not by the rank: the next one may have been asked for before this exit was reported.

        Args:
            status: os.waitstatus_to_exitcode's; None where nobody could learn it.
            serving: it had requests; False while it boots for a rank.
        """
        self.gone.add((rank, self._of.pop(pid, 0)))
        if serving:
            self._crashed |= status not in (-signal.SIGKILL, REPLICA_LOST) or pid in self._stalled
        self._stalled.discard(pid)

    def take_suspicion(self) -> bool:
        """Whether, since the last call, a worker may have ended by a request's doing. One that somebody kills has not;
        one that crashed, or that stood still, may have."""
        crashed, self._crashed = self._crashed, False
        return crashed
