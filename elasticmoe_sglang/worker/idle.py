"""Sleeping while the whole server is idle.

SGLang's schedulers under DP attention run their loop in lock-step even with nothing to do. Instead, each sleeps until
one of its sockets is readable or another rank rings its doorbell. A rank that is woken by its own sockets, or by the
timeout, rings all others, so that all run the next iteration without delay.
"""

from __future__ import annotations

import os
from typing import Any

import zmq

from elasticmoe_sglang.comm.region import CollectiveRegion

ENV_DOORBELLS = "ELASTICMOE_DOORBELLS"
_SHORT_MS, _LONG_MS = 1, 200
_SHORT_ROUNDS = 50


def create_doorbells(capacity: int) -> list[int]:
    """One eventfd a rank. Workers find theirs by `ENV_DOORBELLS`, the numbers separated by commas; they inherit them
    from the main process through any IMM, so that workers of different IMMs have the same ones."""
    return [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(capacity)]


class IdleWait:
    """Args:
    region: tells which ranks are members.
    """

    def __init__(self, region: CollectiveRegion) -> None:
        self._region = region
        self._bells = [int(fd) for fd in os.environ.get(ENV_DOORBELLS, "").split(",") if fd]
        self._poller = zmq.Poller()
        self._rounds = 0
        self.slept = False
        if self._bells:
            self._poller.register(self._bells[region.rank], zmq.POLLIN)

    def watch(self, socket: Any) -> None:
        """Also wake up when this socket is readable."""
        self._poller.register(socket, zmq.POLLIN)

    def busy(self) -> None:
        """There was work: the next waits are short again."""
        self._rounds = 0

    def wait(self) -> None:
        """Sleep until a message arrives, another rank rings, or a timeout (longer once idle for a while)."""
        self._rounds += 1
        ready = self._poller.poll(_SHORT_MS if self._rounds <= _SHORT_ROUNDS else _LONG_MS)
        mine = self._bells[self._region.rank] if self._bells else -1
        rung = any(source == mine for source, _ in ready)
        if rung:
            os.eventfd_read(mine)
        if any(source != mine for source, _ in ready):
            self.busy()
        if not rung:
            self.wake_others()
        self.slept = True

    def wake_others(self) -> None:
        """Ring every other member."""
        for rank in self._region.members:
            if rank != self._region.rank and self._bells:
                os.eventfd_write(self._bells[rank], 1)

    def wake_all(self) -> None:
        """Ring every member, this rank too (from another thread)."""
        self.wake_others()
        if self._bells:
            os.eventfd_write(self._bells[self._region.rank], 1)
