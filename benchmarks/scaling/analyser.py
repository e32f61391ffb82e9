"""From a run's log to its figures: a pure function, as docs/benchmarks.md defines them."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from benchmarks.scaling.figures import ChangeFigures, Figures, Rate, Slo, Spread
from benchmarks.scaling.records import ChangeRecord, DevicePeak, Holding, MemorySample, RequestRecord, RunLog

STALL_S = 1.0
"""Silence from which on waiting users count as shut out, even though their requests were accepted."""
MIN_DURING_S = 5.0
"""A change that is over sooner is measured over this long. Where more ranks share the same cores, each request takes
some tenths of a second longer from then on: its tokens come later, once, and in a window of one or two seconds that
would count as throughput lost. The longest gap shows what a shorter dip does to a user."""


def analyse(log: RunLog, slo: Slo, *, window_s: float = 15.0, stall_s: float = STALL_S) -> Figures:
    """All figures of one run.

    Args:
        window_s: length of the windows `before` and `after` a change.
        stall_s: silence that counts as downtime although nothing was refused.
    """
    requests = log.requests
    arrivals = sorted(token.at for request in requests for token in request.tokens)
    completed = [request for request in requests if is_complete(request)]
    failed = [request for request in requests if not is_complete(request)]
    good = sum(meets(request, slo) for request in requests)
    changes = [
        _change_figures(log, change, following, arrivals, window_s, stall_s)
        for change, following in zip(log.changes, [*log.changes[1:], None], strict=False)
    ]
    return Figures(
        method=log.method,
        requests=len(requests),
        completed=len(completed),
        failed=len(failed),
        refused=sum(not request.tokens for request in failed),
        aborted=sum(bool(request.tokens) for request in failed),
        lost_tokens=sum(lost_tokens(request) for request in requests),
        duplicated_tokens=sum(duplicated_tokens(request) for request in requests),
        ttft=spread([t for request in requests if (t := ttft(request)) is not None]),
        tpot=spread([t for request in requests if (t := tpot(request)) is not None]),
        max_gaps=spread([gap for request in requests if (gap := max_gap(request)) is not None]),
        throughput=rate(requests, arrivals, 0.0, log.load_ended_at),
        slo_attainment=good / len(requests) if requests else None,
        goodput=good / log.load_ended_at if log.load_ended_at else 0.0,
        downtime_s=downtime(requests, arrivals, 0.0, log.ended_at, stall_s),
        device_seconds=device_seconds(log.holdings, log.load_ended_at),
        host_peak_bytes=max((sample.host_bytes for sample in log.memory), default=None),
        device_peak_over_steady=device_peak_over_steady(log.device_memory),
        changes=changes,
    )


# -- one request ------------------------------------------------------------------------------------------------------


def is_complete(request: RequestRecord) -> bool:
    """Ended without an error and with every token that was asked for, each once."""
    return request.error is None and lost_tokens(request) == 0 and duplicated_tokens(request) == 0


def lost_tokens(request: RequestRecord) -> int:
    """Positions without a token, of an answer that had begun or that ended without an error."""
    if request.error is not None and not request.tokens:
        return 0
    return request.wanted - len({token.position for token in request.tokens if token.position < request.wanted})


def duplicated_tokens(request: RequestRecord) -> int:
    """Tokens at a position that had one, and tokens beyond the last position wanted."""
    return len(request.tokens) - len({token.position for token in request.tokens if token.position < request.wanted})


def ttft(request: RequestRecord) -> float | None:
    """From the moment it was due, so that a client that cannot send counts as waiting."""
    return request.tokens[0].at - request.due_at if request.tokens else None


def tpot(request: RequestRecord) -> float | None:
    """Mean time per output token after the first."""
    if len(request.tokens) < 2:
        return None
    return (request.tokens[-1].at - request.tokens[0].at) / (len(request.tokens) - 1)


def max_gap(request: RequestRecord) -> float | None:
    """Largest time between two consecutive tokens; for a request that broke off, up to its error too."""
    times = [token.at for token in request.tokens]
    if request.error is not None and times:
        times.append(request.ended_at)
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=None)


def meets(request: RequestRecord, slo: Slo) -> bool:
    """Complete, and within both limits. A failed request never is."""
    first, each = ttft(request), tpot(request)
    return is_complete(request) and first is not None and first <= slo.ttft_s and (each is None or each <= slo.tpot_s)


# -- all requests together --------------------------------------------------------------------------------------------


def rate(requests: Sequence[RequestRecord], arrivals: Sequence[float], start: float, end: float) -> Rate:
    """Tokens that arrived, and requests that completed, in [start, end)."""
    length = end - start
    tokens = bisect_left(arrivals, end) - bisect_left(arrivals, start)
    done = sum(is_complete(request) and start <= request.ended_at < end for request in requests)
    if length <= 0:
        return Rate(start=start, end=end, tokens_per_s=0.0, requests_per_s=0.0)
    return Rate(start=start, end=end, tokens_per_s=tokens / length, requests_per_s=done / length)


def downtime(
    requests: Sequence[RequestRecord], arrivals: Sequence[float], start: float, end: float, stall_s: float
) -> float:
    """Seconds in which nothing was served and nothing admitted, within [start, end].

    A silence lies between two consecutive token arrivals of the whole service. It counts in full if a request failed
    in it. Without a failure only the part in which requests were waiting counts, and only if that part is longer than
    `stall_s`.
    """
    inside = arrivals[bisect_left(arrivals, start) : bisect_right(arrivals, end)]
    failures = sorted(request.ended_at for request in requests if not is_complete(request))
    waiting = sorted((request.sent_at, request.ended_at) for request in requests)
    total = 0.0
    for earlier, later in zip([start, *inside], [*inside, end], strict=True):
        if bisect_right(failures, later) > bisect_right(failures, earlier):
            total += later - earlier
        elif later - earlier > stall_s and (waited := _covered(waiting, earlier, later)) > stall_s:
            total += waited
    return total


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


def device_seconds(holdings: Sequence[Holding], end: float) -> float:
    """Devices held, integrated over [0, end]."""
    total = 0.0
    for holding, following in zip(holdings, [*holdings[1:], None], strict=False):
        until = end if following is None else min(following.at, end)
        total += holding.devices * max(0.0, until - max(0.0, holding.at))
    return total


def device_peak_over_steady(devices: Sequence[DevicePeak]) -> float | None:
    """The worst device: its peak over the larger of its steady states, less one."""
    shares = [d.peak / max(d.before, d.after) - 1 for d in devices if max(d.before, d.after)]
    return max(shares, default=None)


# -- one change -------------------------------------------------------------------------------------------------------


def scale_latency(log: RunLog, change: ChangeRecord) -> float | None:
    """From the request for the change to the first token that a client got from the service at its new size."""
    if change.effective_at is None:
        return None
    served = [
        token.at
        for request in log.requests
        if request.generation >= change.generation
        for token in request.tokens
        if token.at >= change.effective_at
    ]
    return min(served) - change.requested_at if served else None


def _change_figures(
    log: RunLog,
    change: ChangeRecord,
    following: ChangeRecord | None,
    arrivals: Sequence[float],
    window_s: float,
    stall_s: float,
) -> ChangeFigures:
    start = change.requested_at
    latency = scale_latency(log, change)
    limit = min(log.load_ended_at, following.requested_at if following else math.inf)
    # A change that never served at its new size lasted until it was given up.
    lasted = change.ended_at - start if latency is None else latency
    end = min(limit, start + max(lasted, MIN_DURING_S))
    earlier = [other.ended_at for other in log.changes if other.requested_at < start]
    before = rate(log.requests, arrivals, max([0.0, start - window_s, *earlier]), start)
    during = rate(log.requests, arrivals, start, end)
    after = rate(log.requests, arrivals, end, min(limit, end + window_s))
    gaps = [
        later.at - token.at
        for request in log.requests
        for token, later in zip(request.tokens, request.tokens[1:], strict=False)
        if later.at >= start and token.at < end
    ]
    return ChangeFigures(
        old_size=change.old_size,
        new_size=change.new_size,
        scale_latency_s=latency,
        downtime_s=downtime(log.requests, arrivals, start, max(end, min(change.ended_at, limit)), stall_s),
        before=before,
        during=during,
        after=after,
        during_over_before=during.tokens_per_s / before.tokens_per_s if before.tokens_per_s else None,
        max_gap_s=max(gaps, default=None),
        memory_peak_over_steady=_memory_peak(log.memory, change, max([0.0, *earlier]), limit),
        error=change.error,
        detail=change.detail,
    )


def _memory_peak(samples: Sequence[MemorySample], change: ChangeRecord, since: float, limit: float) -> float | None:
    """Peak while the change ran over the larger of the states before (from `since` on) and after it, less one."""
    before = [sample.host_bytes for sample in samples if since <= sample.at < change.requested_at]
    during = [sample.host_bytes for sample in samples if change.requested_at <= sample.at <= change.ended_at]
    after = [sample.host_bytes for sample in samples if change.ended_at < sample.at <= limit]
    if not before or not during or not after:
        return None
    # A median, so that one sample in the middle of something else does not move the steady state.
    steady = max(_median(before), _median(after))
    return max(max(during) / steady - 1, 0.0)


def _median(values: Sequence[int]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def spread(values: Sequence[float]) -> Spread:
    """Nearest-rank percentiles."""
    if not values:
        return Spread(count=0)
    ordered = sorted(values)

    def percentile(share: float) -> float:
        return ordered[math.ceil(share * len(ordered)) - 1]

    return Spread(count=len(ordered), p50=percentile(0.5), p90=percentile(0.9), p99=percentile(0.99), max=ordered[-1])
