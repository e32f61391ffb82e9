"""From a run's log to its figures: a pure function, as docs/benchmarks.md defines them."""

from __future__ import annotations

import itertools
import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from benchmarks.scaling.figures import ChangeFigures, Figures, Rate, Slo, Spread
from benchmarks.scaling.records import ChangeRecord, DevicePeak, MemorySample, RequestRecord, RunLog
from benchmarks.streams import worst_gap

STALL_S = 1.0
"""Silence from which on waiting users count as shut out, even though their requests were accepted."""
MIN_DURING_S = 2.0
"""A change that is over sooner is measured over this long: with a few requests a second, less holds too few of them."""
AROUND_S = 0.5
"""A change may still lengthen a gap that ends this long after it."""
GAP_TIMES, GAP_MORE_S = 3, 0.05


def analyse(log: RunLog, slo: Slo, *, window_s: float = 15.0, stall_s: float = STALL_S) -> Figures:
    """All figures of one run.

    Args:
        window_s: length of the windows `before` and `after` a change.
        stall_s: silence that counts as downtime although nothing was refused.
    """
    requests = log.requests
    arrivals = sorted(at for request in requests for at in request.arrivals)
    failed = [request for request in requests if not is_complete(request)]
    good = sum(meets(request, slo) for request in requests)
    return Figures(
        requests=len(requests),
        completed=len(requests) - len(failed),
        failed=len(failed),
        refused=sum(not request.arrivals for request in failed),
        aborted=sum(bool(request.arrivals) for request in failed),
        lost_tokens=sum(lost_tokens(request) for request in requests),
        doubled_tokens=sum(max(0, len(request.arrivals) - request.wanted) for request in requests),
        ttft=spread(present(ttft(request) for request in requests)),
        tpot=spread(present(tpot(request) for request in requests)),
        max_gaps=spread(present(max_gap(request) for request in requests)),
        served=rate(requests, arrivals, slo, 0.0, log.load_ended_at),
        slo_attainment=good / len(requests) if requests else None,
        downtime_s=downtime(requests, arrivals, 0.0, log.ended_at, stall_s),
        memory_bytes=max((sample.host_bytes for sample in log.memory), default=None),
        device_memory_over=device_memory_over(log.device_memory),
        changes=[_Change(log, number, arrivals, slo, window_s).figures(stall_s) for number in range(len(log.changes))],
    )


# -- one request ------------------------------------------------------------------------------------------------------


def is_complete(request: RequestRecord) -> bool:
    """Ended without an error and with exactly the tokens that were asked for."""
    return request.error is None and len(request.arrivals) == request.wanted


def lost_tokens(request: RequestRecord) -> int:
    """Tokens that never came, of an answer that had begun or that ended without an error."""
    if request.error is not None and not request.arrivals:
        return 0
    return max(0, request.wanted - len(request.arrivals))


def ttft(request: RequestRecord) -> float | None:
    """From the moment it was due, so that a client that cannot send counts as waiting."""
    return request.arrivals[0] - request.due_at if request.arrivals else None


def tpot(request: RequestRecord) -> float | None:
    """Mean time per output token after the first."""
    times = request.arrivals
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def gaps(request: RequestRecord) -> list[tuple[float, float]]:
    """(when, seconds) between each token and the one before it; for a request that broke off, up to its error too."""
    times = list(request.arrivals)
    if request.error is not None and times:
        times.append(request.ended_at)
    return [(later, later - earlier) for earlier, later in itertools.pairwise(times)]


def max_gap(request: RequestRecord) -> float | None:
    return max((gap for _, gap in gaps(request)), default=None)


def meets(request: RequestRecord, slo: Slo) -> bool:
    """Complete, and within both limits. A failed request never is."""
    first, each = ttft(request), tpot(request)
    return is_complete(request) and first is not None and first <= slo.ttft_s and (each is None or each <= slo.tpot_s)


# -- all requests together --------------------------------------------------------------------------------------------


def rate(requests: Sequence[RequestRecord], arrivals: Sequence[float], slo: Slo, start: float, end: float) -> Rate:
    """Tokens that arrived in [start, end), and requests due in it that kept the SLO, per second."""
    length = end - start
    if length <= 0:
        return Rate(start=start, end=end, tokens_per_s=0.0, goodput=0.0)
    tokens = bisect_left(arrivals, end) - bisect_left(arrivals, start)
    good = sum(start <= request.due_at < end and meets(request, slo) for request in requests)
    return Rate(start=start, end=end, tokens_per_s=tokens / length, goodput=good / length)


def downtime(
    requests: Sequence[RequestRecord], arrivals: Sequence[float], start: float, end: float, stall_s: float
) -> float:
    """Seconds in which nothing was served and nothing admitted, within [start, end].

    A silence lies between two consecutive token arrivals of the whole service. It counts in full if a request failed
    in it. Without a failure only the part in which requests were waiting counts, and only if that part is longer than
    `stall_s`.
    """
    failures = sorted(request.ended_at for request in requests if not is_complete(request))
    total = 0.0
    for earlier, later, waited in _silences(requests, arrivals, start, end):
        if bisect_right(failures, later) > bisect_right(failures, earlier):
            total += later - earlier
        elif waited > stall_s:
            total += waited
    return total


def _silences(
    requests: Sequence[RequestRecord], arrivals: Sequence[float], start: float, end: float
) -> Iterable[tuple[float, float, float]]:
    """(from, to, seconds of it in which a request was waiting) between the tokens of the whole service."""
    inside = arrivals[bisect_left(arrivals, start) : bisect_right(arrivals, end)]
    waiting = sorted((request.sent_at, request.ended_at) for request in requests)
    for earlier, later in zip([start, *inside], [*inside, end], strict=True):
        if later > earlier:
            yield earlier, later, _covered(waiting, earlier, later)


def _covered(intervals: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """Length of [start, end] that lies in at least one of the intervals (sorted by their start)."""
    total, reached = 0.0, start
    for left, right in intervals:
        if left >= end:
            break
        if right > reached:
            total += min(right, end) - max(left, reached)
            reached = min(right, end)
    return total


def device_memory_over(devices: Sequence[DevicePeak]) -> float | None:
    """The worst device: its peak over the larger of its steady states, less one."""
    shares = [d.peak / max(d.before, d.after) - 1 for d in devices if max(d.before, d.after)]
    return max(shares, default=None)


# -- one change -------------------------------------------------------------------------------------------------------


def scale_latency(log: RunLog, change: ChangeRecord) -> float | None:
    """From the request for the change to the first token that a client got from the service at its new size."""
    effective = change.effective_at
    if effective is None or change.new_size == change.old_size:
        return None
    served = [
        at
        for request in log.requests
        if request.generation >= change.generation
        for at in request.arrivals
        if at >= effective
    ]
    return min(served) - change.requested_at if served else None


class _Change:
    """One change of a log with its windows: before, during, after."""

    def __init__(self, log: RunLog, number: int, arrivals: Sequence[float], slo: Slo, window_s: float) -> None:
        self.log, self.arrivals, self.slo = log, arrivals, slo
        change = self.change = log.changes[number]
        following = log.changes[number + 1].requested_at if number + 1 < len(log.changes) else math.inf
        self.limit = min(log.load_ended_at, following)
        self.latency = scale_latency(log, change)
        self.start = change.requested_at
        # A change that never served at its new size lasted until it was given up.
        lasted = change.ended_at - self.start if self.latency is None else self.latency
        self.end = min(self.limit, self.start + max(lasted, MIN_DURING_S))
        self.since = max((other.ended_at for other in log.changes[:number]), default=0.0)
        self.windows = (
            (max(self.start - window_s, self.since), self.start),
            (self.start, self.end),
            (self.end, min(self.limit, self.end + window_s)),
        )

    def figures(self, stall_s: float) -> ChangeFigures:
        change, requests = self.change, self.log.requests
        before, during, after = (rate(requests, self.arrivals, self.slo, *window) for window in self.windows)
        until = max(self.end, min(change.ended_at, self.limit))
        streams = [
            worst
            for request in requests
            if (worst := worst_gap(gaps(request), self.start, min(until + AROUND_S, self.limit))) is not None
        ]
        longest, usual = spread([worst.longest for worst in streams]), self._usual_gap()
        larger, smaller = self._memory()
        return ChangeFigures(
            old_size=change.old_size,
            new_size=change.new_size,
            scale_latency_s=self.latency,
            total_s=None if change.error else change.ended_at - self.start,
            downtime_s=downtime(requests, self.arrivals, self.start, until, stall_s),
            before=before,
            during=during,
            after=after,
            gain=over(after.tokens_per_s, before.tokens_per_s) if after.end > after.start else None,
            during_over_before=over(during.tokens_per_s, before.tokens_per_s),
            usual_gap_s=usual,
            gaps=longest,
            gap_over_s=longest.p99 - (GAP_TIMES * usual + GAP_MORE_S) if longest.p99 and usual else None,
            worst_gap_over_limit=max((worst.over_limit for worst in streams), default=None),
            silence_s=max(
                (waited for *_, waited in _silences(requests, self.arrivals, self.start, until)), default=0.0
            ),
            ttft_before=self._ttft(*self.windows[0]),
            ttft_during=self._ttft(*self.windows[1]),
            recovered_s=self._recovered(),
            pause_ms=sorted(change.detail.get("pause_ms", {}).values()),
            memory_over=larger,
            memory_over_smaller=smaller,
            error=change.error,
            detail=change.detail,
        )

    def _usual_gap(self) -> float | None:
        """The median gap before the change."""
        start, end = self.windows[0]
        return spread([gap for request in self.log.requests for at, gap in gaps(request) if start < at <= end]).p50

    def _ttft(self, start: float, end: float) -> Spread:
        """Of requests that were due in the window. One that never got a token waited until it ended."""
        due = [request for request in self.log.requests if start <= request.due_at < end]
        return spread([(request.arrivals or [request.ended_at])[0] - request.due_at for request in due])

    def _recovered(self) -> float | None:
        firsts = [
            (request.due_at, request.arrivals[0] if request.arrivals else math.inf)
            for request in self.log.requests
            if self.start <= request.due_at < self.limit
        ]
        late = [first for due, first in firsts if first - due > self.slo.ttft_s]
        last = max(late, default=self.start)
        return last - self.start if last < self.limit else None

    def _memory(self) -> tuple[float | None, float | None]:
        """Peak while the change ran over the larger, and over the smaller, of the states before and after it."""
        change, samples = self.change, self.log.memory

        def held(start: float, end: float) -> list[int]:
            first, last = (bisect_left(samples, moment, key=_sampled_at) for moment in (start, end))
            return [sample.host_bytes for sample in samples[first:last]]

        before = held(self.since, self.start)
        during = held(self.start, change.ended_at)
        after = held(change.ended_at, self.limit)
        if not before or not during or not after:
            return None, None
        # A median, so that one sample in the middle of something else does not move the steady state.
        steady = statistics.median(before), statistics.median(after)
        return max(during) / max(steady) - 1, max(during) / min(steady) - 1


def _sampled_at(sample: MemorySample) -> float:
    return sample.at


def over(value: float, base: float) -> float | None:
    return value / base if base else None


def present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def spread(values: Sequence[float]) -> Spread:
    """Nearest-rank percentiles."""
    if not values:
        return Spread(count=0)
    ordered = sorted(values)

    def percentile(share: float) -> float:
        return ordered[math.ceil(share * len(ordered)) - 1]

    return Spread(count=len(ordered), p50=percentile(0.5), p90=percentile(0.9), p99=percentile(0.99), max=ordered[-1])
