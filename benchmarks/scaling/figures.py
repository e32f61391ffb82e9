"""The figures of one run. Each is defined once, in docs/benchmarks.md; the names here are the names there."""

from __future__ import annotations

from typing import Any

import msgspec


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request has to keep: time to first token, and mean time per output token after it, in seconds."""

    ttft_s: float
    tpot_s: float


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles in seconds (nearest rank) over `count` values; None where there is no value."""

    count: int
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    max: float | None = None


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """One window: tokens that arrived in it, and requests that were due in it and kept the SLO, per second."""

    start: float
    end: float
    tokens_per_s: float
    goodput: float


class ChangeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One change, or a moment without one (`old_size` equal to `new_size`). Seconds.

    Attributes:
        scale_latency_s: until a client got a token from the service at its new size; total_s: until nothing was left
            to do.
        gain: tokens per second after it over those before it; during_over_before likewise.
        usual_gap_s: median of all gaps between two tokens of one stream before the change.
        gaps: the longest gap of each stream around the change: percentiles are over streams, so that a gap that each of
            them has once is not lost among their other ones.
        gap_over_s: by how much the 99th percentile of these exceeds three times the usual gap + 50 ms.
        worst_gap_over_limit: the longest gap of the stream that came closest to its limit (`streams.WorstGap`) or
            furthest beyond it, over that limit.
        silence_s: the longest time around the change in which no stream at all got a token while one was waiting.
        ttft_before, ttft_during: of requests that were due in the window.
        recovered_s: until the last request that was late with its first token had it; 0 when none was late, None when
            requests still were at the end of the load.
        pause_ms: of each rank that served before and after.
        memory_over: peak over the larger of the states before and after it, less one; memory_over_smaller likewise.
        detail: what the method reports about it (`ChangeRecord.detail`).
    """

    old_size: int
    new_size: int
    scale_latency_s: float | None
    total_s: float | None
    downtime_s: float
    before: Rate
    during: Rate
    after: Rate
    gain: float | None
    during_over_before: float | None
    usual_gap_s: float | None
    gaps: Spread
    gap_over_s: float | None
    worst_gap_over_limit: float | None
    silence_s: float
    ttft_before: Spread
    ttft_during: Spread
    recovered_s: float | None
    pause_ms: list[float]
    memory_over: float | None
    memory_over_smaller: float | None
    error: str | None = None
    detail: dict[str, Any] = {}


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        requests = completed + failed; refused and aborted split `failed` by whether a token had arrived.
        lost_tokens: wanted but never arrived, of requests that were not refused; doubled_tokens: beyond those wanted.
        max_gaps: spread of each request's largest gap between two of its tokens.
        served: over the time of the load. slo_attainment: share of all requests that kept the SLO.
        device_memory_over: largest share over its own larger steady state that a device's memory reached in the HMM's
            ledger.
    """

    requests: int
    completed: int
    failed: int
    refused: int
    aborted: int
    lost_tokens: int
    doubled_tokens: int
    ttft: Spread
    tpot: Spread
    max_gaps: Spread
    served: Rate
    slo_attainment: float | None
    downtime_s: float
    memory_bytes: int | None
    device_memory_over: float | None
    changes: list[ChangeFigures]
