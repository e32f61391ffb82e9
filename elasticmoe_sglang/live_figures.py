"""What clients have seen in each of the last seconds: tokens, time to first token, gaps, requests.

`LiveFigures` keeps the seconds; it is told of events and measures nothing itself. `OpenRequests` tells it, by looking
at the requests that have not ended. Both belong to one thread.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

SECONDS = 600
LOOK_S = 0.02
"""Between two looks at the open requests: gaps are known to within this time."""
_LOOK_SHARE = 0.01
"""Looking takes at most this share of a core, for as long as a look comes every _RARELY_S."""
_RARELY_S = 0.25


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One second. TTFT and gaps are those of streamed requests: SGLang hands on the tokens of others in lumps.

    Attributes:
        at: Unix time of its begin, in seconds.
        tokens: generated tokens that arrived in the main process, of all requests.
        arrived, ended: requests.
        ttft_p50_ms, ttft_p99_ms: of requests whose first token came in this second; None: there was none.
        longest_gap_ms: longest time that any request waited for its next token, still waiting ones included; None: no
            request waited.
        running: requests that have a token, at the end of the second.
        queued: requests without one, waiting or in their prefill, at the end of the second.
    """

    at: int
    tokens: int
    arrived: int
    ended: int
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    longest_gap_ms: float | None
    running: int
    queued: int


@dataclass(kw_only=True)
class _Second:
    at: int
    running: int
    queued: int
    tokens: int = 0
    arrived: int = 0
    ended: int = 0
    ttfts: list[float] = field(default_factory=list)
    gap: float | None = None

    def figures(self) -> Figures:
        ttfts = sorted(self.ttfts)
        return Figures(
            at=self.at,
            tokens=self.tokens,
            arrived=self.arrived,
            ended=self.ended,
            ttft_p50_ms=_milliseconds(quantile(ttfts, 0.5)),
            ttft_p99_ms=_milliseconds(quantile(ttfts, 0.99)),
            longest_gap_ms=_milliseconds(self.gap),
            running=self.running,
            queued=self.queued,
        )


class LiveFigures:
    """The last seconds, one entry each, also for those in which nothing happened.

    Args:
        seconds: how many are kept.
        clock: Unix time in seconds.
    """

    def __init__(self, seconds: int = SECONDS, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._seconds: deque[_Second] = deque([_Second(at=int(clock()), running=0, queued=0)], maxlen=seconds + 1)

    def _now(self) -> _Second:
        last, now = self._seconds[-1], int(self._clock())
        kept = self._seconds.maxlen or 0
        # A clock that was set back goes on in its last second.
        for at in range(max(last.at + 1, now - kept + 1), now + 1):
            self._seconds.append(_Second(at=at, running=last.running, queued=last.queued))
        return self._seconds[-1]

    def arrived(self, requests: int = 1) -> None:
        """Requests were sent to a rank."""
        self._now().arrived += requests

    def tokens(self, count: int) -> None:
        """Generated tokens arrived."""
        self._now().tokens += count

    def first_token(self, seconds: float) -> None:
        """A streamed request got its first token, this long after it came."""
        self._now().ttfts.append(seconds)

    def gap(self, seconds: float) -> None:
        """A streamed request that has a token waited so long for its next one, or still waits."""
        second = self._now()
        second.gap = seconds if second.gap is None else max(second.gap, seconds)

    def ended(self, requests: int = 1) -> None:
        """Requests ended, however."""
        self._now().ended += requests

    def load(self, *, running: int, queued: int) -> None:
        """So many requests have a token, and so many have none."""
        second = self._now()
        second.running, second.queued = running, queued

    def since(self, at: int | None = None) -> list[Figures]:
        """The seconds that have ended, oldest first; with `at` only those that began later."""
        self._now()
        ended = list(self._seconds)[:-1]
        return [second.figures() for second in ended if at is None or second.at > at]


class TimeStats(Protocol):
    """Of SGLang's `APIServerReqTimeStats`: `time.perf_counter()` seconds, 0 for what has not happened."""

    created_time: float
    first_token_time: float
    finished_time: float


class RequestState(Protocol):
    """Of SGLang's `ReqState`: what these figures need of one request."""

    finished: bool
    output_ids: list[int]
    time_stats: Any
    """As `TimeStats`."""
    obj: Any
    """The request; `stream` says whether its tokens are sent as they come."""


@dataclass(kw_only=True)
class _Open:
    state: RequestState
    streamed: bool
    tokens: int = 0
    last_at: float = 0.0


class OpenRequests:
    """Looks at requests that were sent and have not ended, and tells the figures what has happened to them.

    Args:
        is_open: whether SGLang still keeps the request of this id with this state.
        clock: that of `TimeStats`.
        processor: seconds of processor time of this thread.
    """

    def __init__(
        self,
        figures: LiveFigures,
        is_open: Callable[[str, RequestState], bool],
        clock: Callable[[], float] = time.perf_counter,
        processor: Callable[[], float] = time.thread_time,
    ) -> None:
        self._figures = figures
        self._is_open = is_open
        self._clock = clock
        self._processor = processor
        self._open: dict[str, _Open] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, rid: str, state: RequestState) -> None:
        """A request was sent to a rank; sending it again changes nothing."""
        if rid not in self._open:
            self._open[rid] = _Open(state=state, streamed=bool(getattr(state.obj, "stream", False)))
            self._figures.arrived()

    def look(self) -> float:
        """Look at each once. Returns the seconds until the next look."""
        now, begin = self._clock(), self._processor()
        tokens, gap, ended = 0, None, []
        for rid, request in self._open.items():
            state = request.state
            count = len(state.output_ids)
            ends = state.finished or not self._is_open(rid, state)
            if ends:
                ended.append(rid)
            tokens += count - request.tokens
            if request.streamed and count:
                waited = self._waited(request, count, now)
                gap = waited if gap is None else max(gap, waited)
            request.tokens = count
        for rid in ended:
            del self._open[rid]
        figures = self._figures
        if tokens:
            figures.tokens(tokens)
        if gap is not None:
            figures.gap(gap)
        if ended:
            figures.ended(len(ended))
        running = sum(1 for request in self._open.values() if request.tokens)
        figures.load(running=running, queued=len(self._open) - running)
        return min(_RARELY_S, max(LOOK_S, (self._processor() - begin) / _LOOK_SHARE))

    def _waited(self, request: _Open, count: int, now: float) -> float:
        """Seconds since the request's token before; notes its first one."""
        times = request.state.time_stats
        if not request.tokens:
            request.last_at = times.first_token_time or now
            self._figures.first_token(request.last_at - times.created_time)
        came_at = min(now, times.finished_time) if request.state.finished and times.finished_time else now
        waited = came_at - request.last_at
        if count > request.tokens:
            # The first token's own time is known; a token that came since then came about now.
            request.last_at = request.last_at if not request.tokens and count == 1 else came_at
        return max(0.0, waited)


def quantile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of the values does not exceed; None without values.

    Args:
        ordered: ascending.
    """
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)
