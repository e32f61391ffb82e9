"""Counts what happens to requests where SGLang handles them, and hands it to the estimator, which runs elsewhere.

The writing side is called for every request and every batch of output, so it does as little as it can. One thread
writes and one drains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence, Sized
from itertools import compress, count
from typing import Any, Protocol

_MOST_EVENTS = 500_000
"""Beyond it the oldest events are dropped: nobody drains any more."""
_ARRIVED, _FIRST, _ENDED, _ABORTED = range(4)


class Listener(Protocol):
    """Where events go; `estimator.Estimator`."""

    def arrived(self, at: float, rid: str, prompt_tokens: int, streams: bool = True) -> None: ...
    def first_token(self, at: float, rid: str) -> None: ...
    def produced(self, at: float, tokens: int) -> None: ...
    def ended(self, at: float, rid: str, output_tokens: int) -> None: ...
    def aborted(self, at: float, rid: str) -> None: ...


class RequestMeter:
    """Times are seconds on one monotonic clock."""

    def __init__(self) -> None:
        self._events: deque[tuple[int, float, str, int, bool]] = deque(maxlen=_MOST_EVENTS)
        self._silent: set[str] = set()
        self._tokens = self._drained_tokens = 0

    def arrived(self, at: float, rid: str, prompt_tokens: int, streams: bool) -> None:
        """A request is sent to a rank."""
        self._silent.add(rid)
        self._events.append((_ARRIVED, at, rid, prompt_tokens, streams))

    def output(
        self,
        at: float,
        rids: Sequence[str],
        new_ids: Sequence[Sized] | None,
        lengths: Sequence[int],
        reasons: Sequence[Any],
    ) -> None:
        """A batch of output came.

        Args:
            new_ids: each request's new tokens.
            lengths: its output tokens so far.
            reasons: why it has finished, {"type": ...}; None while it runs.
        """
        if new_ids is not None:
            self._tokens += sum(map(len, new_ids))
        silent = self._silent
        if silent and (came := silent.intersection(rids)):
            silent -= came
            for rid in came:
                self._events.append((_FIRST, at, rid, 0, True))
        for place in compress(count(), reasons):
            kind = _ABORTED if reasons[place].get("type") == "abort" else _ENDED
            self._events.append((kind, at, rids[place], lengths[place], True))

    def aborted(self, at: float, rid: str) -> None:
        """A request ended without output."""
        self._silent.discard(rid)
        self._events.append((_ABORTED, at, rid, 0, True))

    def drain(self, now: float, listener: Listener) -> None:
        """Hand over all events since the last call."""
        for _ in range(len(self._events)):
            kind, at, rid, tokens, streams = self._events.popleft()
            if kind == _ARRIVED:
                listener.arrived(at, rid, tokens, streams)
            elif kind == _FIRST:
                listener.first_token(at, rid)
            elif kind == _ENDED:
                listener.ended(at, rid, tokens)
            else:
                listener.aborted(at, rid)
        produced = self._tokens
        listener.produced(now, produced - self._drained_tokens)
        self._drained_tokens = produced
