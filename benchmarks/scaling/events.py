"""A small discrete-event engine: processes are generators that wait, or hold a resource for a while, first come first
served.

A process yields `Wait(seconds)`, `Hold(resource, seconds)` or `Join(processes)`.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field


class Resource:
    """Something that `capacity` processes can hold at a time."""

    def __init__(self, name: str, capacity: int = 1) -> None:
        self.name = name
        self.free = capacity
        self.queue: deque[Callable[[], None]] = deque()
        self.busy_s = 0.0


@dataclass(frozen=True)
class Wait:
    """Go on after this many seconds."""

    seconds: float


@dataclass(frozen=True)
class Hold:
    """Go on when the resource was free and has been held for this many seconds."""

    resource: Resource
    seconds: float


@dataclass(eq=False)
class Process:
    """A started process; `ended_at` is None while it runs."""

    ended_at: float | None = None
    waiting: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True)
class Join:
    """Go on when all of these have ended."""

    processes: Sequence[Process]


Steps = Generator["Wait | Hold | Join", None, None]


class Engine:
    """Starts processes and runs them to the end; `now` is the simulated time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def start(self, steps: Steps) -> Process:
        process = Process()
        self._at(self.now, lambda: self._advance(process, steps))
        return process

    def run(self) -> float:
        """Until nothing is left to happen; returns the time of the last event."""
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()
        return self.now

    def _at(self, moment: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._order), action))

    def _advance(self, process: Process, steps: Steps) -> None:
        try:
            step = next(steps)
        except StopIteration:
            process.ended_at = self.now
            for action in process.waiting:
                self._at(self.now, action)
            return

        def proceed() -> None:
            self._advance(process, steps)

        if isinstance(step, Wait):
            self._at(self.now + step.seconds, proceed)
        elif isinstance(step, Hold):
            self._take(step, proceed)
        else:
            self._join(step, proceed)

    def _take(self, step: Hold, proceed: Callable[[], None]) -> None:
        resource = step.resource

        def release_blocks() -> None:
            resource.busy_s += step.seconds
            resource.free += 1
            if resource.queue:
                resource.queue.popleft()()
            proceed()

        def begin() -> None:
            resource.free -= 1
            self._at(self.now + step.seconds, release_blocks)

        if resource.free:
            begin()
        else:
            resource.queue.append(begin)

    def _join(self, step: Join, proceed: Callable[[], None]) -> None:
        left = [process for process in step.processes if process.ended_at is None]
        missing = len(left)

        def one_less() -> None:
            nonlocal missing
            missing -= 1
            if missing == 0:
                proceed()

        for process in left:
            process.waiting.append(one_less)
        if not left:
            self._at(self.now, proceed)
