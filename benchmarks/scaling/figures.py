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
    """Served in one window: output tokens and completed requests per second."""

    start: float
    end: float
    tokens_per_s: float
    requests_per_s: float


class ChangeFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One change. Seconds; `during_over_before` is of tokens per second, None without anything served before.

    detail: what the method reports about it (`ChangeRecord.detail`): for `elastic` its phases in milliseconds, bytes
        copied, and for a scale-up the slowest joining rank's `weights_s` and the `checkpoint_bytes` that they read.
    """

    old_size: int
    new_size: int
    scale_latency_s: float | None
    downtime_s: float
    before: Rate
    during: Rate
    after: Rate
    during_over_before: float | None
    max_gap_s: float | None
    memory_peak_over_steady: float | None
    error: str | None = None
    detail: dict[str, Any] = {}


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        requests = completed + failed; refused and aborted split `failed` by whether a token had arrived.
        lost_tokens: wanted but never arrived, of requests that were not refused.
        duplicated_tokens: arrived at a position at which one had arrived before, or beyond what was wanted.
        max_gaps: spread of each request's largest gap between two of its tokens.
        goodput: requests within the SLO a second; slo_attainment: their share of all requests.
        host_peak_bytes: largest sum over all processes. device_peak_over_steady: largest share over its own larger
            steady state that a device's memory reached in the HMM's ledger.
    """

    method: str
    requests: int
    completed: int
    failed: int
    refused: int
    aborted: int
    lost_tokens: int
    duplicated_tokens: int
    ttft: Spread
    tpot: Spread
    max_gaps: Spread
    throughput: Rate
    slo_attainment: float | None
    goodput: float
    downtime_s: float
    device_seconds: float
    host_peak_bytes: int | None
    device_peak_over_steady: float | None
    changes: list[ChangeFigures]
