"""What is known of the load and of how it is served: sliding windows over requests, and samples of the ranks.

No clock is read: every call says when it happened, in seconds on one clock. An event costs O(1) amortised.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from elasticmoe_sglang.policy.capacity import CapacityLearner, RankModel
from elasticmoe_sglang.policy.forecast import DemandHistory
from elasticmoe_sglang.policy.settings import LONGEST_WINDOW_S, PolicySettings, Slo
from elasticmoe_sglang.policy.windows import Bucket, Buckets, Durations

REPORT_WINDOW_S = 60.0
"""Of what is shown: attainment, goodput, quantiles."""
NOW_S = 3.0
_QUEUE_S = 2.0
_FULL_SAMPLES, _STEADY = 10, 0.15
"""Samples in a row in which all ranks had queues, while the number of running requests differed by at most this share:
then they do what they can. A queue alone may wait for prefills while the batches still grow."""
_LENGTHS_KEPT = 256
_MOST_OPEN = 200_000
"""Requests that are followed at a time. Beyond it the oldest is forgotten."""
_QUANTILES = (0.5, 0.9, 0.99)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The active ranks at one moment.

    Attributes:
        ranks: how many there are.
        running, waiting: requests in their batches and in their queues, all together.
        kv_use: used share of their KV; None: not known.
        slots: requests that one rank runs at a time; None: not known.
    """

    ranks: int
    running: int
    waiting: int
    kv_use: float | None = None
    slots: int | None = None


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, None without a value."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The inputs of a decision. Tokens are output tokens; rates are per second and of all ranks together.

    Attributes:
        ranks, slots, kv_use, waiting, running: of the latest sample. waiting_least: the shortest queue of the last two
            seconds.
        arrivals_now, arrivals_fast, arrivals_slow: requests a second in the last three seconds, in the fast and in the
            slow window.
        arrivals_seen: requests that arrived in the fast window, which tells how sure the rates are.
        slow_s: seconds that the slow window covers so far.
        output_tokens, output_spread: mean length of an output, and its standard deviation over its mean.
        prompt_tokens: mean length of a prompt.
        tokens_per_s: produced in the fast window.
        itl_s: mean over the fast window, from running requests and tokens; None: nothing ran.
        first_ok, first_late, pace_ok, pace_late: see `windows.Bucket`; in the slow window.
        attainment: share of requests that met the SLO, of those that ended in the last minute; None: none did.
        goodput_tokens_per_s: tokens of those.
        models: what a rank can do, by size.
        expected_tokens_per_s: tokens that requests will ask for soon, by the forecast, and `expected_because`; None:
            nothing is expected.
    """

    ranks: int
    slots: int | None
    kv_use: float | None
    waiting: int
    waiting_least: int
    running: int
    arrivals_now: float
    arrivals_fast: float
    arrivals_slow: float
    arrivals_seen: int
    slow_s: float
    output_tokens: float
    output_spread: float
    prompt_tokens: float
    tokens_per_s: float
    itl_s: float | None
    first_ok: int
    first_late: int
    pace_ok: int
    pace_late: int
    attainment: float | None
    goodput_tokens_per_s: float
    models: dict[int, RankModel]
    expected_tokens_per_s: float | None = None
    expected_because: str = ""


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    arrived: float
    streams: bool
    first: float | None = None
    late: bool = False


class _Length:
    """Mean and spread of the latest lengths, newer ones weighing more."""

    def __init__(self) -> None:
        self.mean = 0.0
        self._var = 0.0
        self._seen = 0

    def add(self, length: float) -> None:
        if self._seen < _LENGTHS_KEPT:
            self._seen += 1
        weight = 1 / self._seen
        delta = length - self.mean
        self.mean += weight * delta
        self._var = (1 - weight) * (self._var + weight * delta * delta)

    @property
    def spread(self) -> float:
        return math.sqrt(self._var) / self.mean if self.mean else 1.0


class Estimator:
    """Receives events in about the order of their times; produces snapshots.

    A request that does not stream is judged by its whole time: TTFT limit, and ITL limit for each further token.

    Args:
        slo: judges requests from here on; None: none are judged.
    """

    def __init__(self, slo: Slo | None = None) -> None:
        self.slo = slo or Slo()
        self.models = CapacityLearner()
        self.demand = DemandHistory()
        self._buckets = Buckets(int(LONGEST_WINDOW_S) + 1)
        self._open: dict[str, _Open] = {}
        # Streams without a first token, oldest first: within the limit, and beyond it.
        self._silent: dict[str, _Open] = {}
        self._overdue: dict[str, _Open] = {}
        self._output, self._prompt = _Length(), _Length()
        self._mark = -math.inf
        self._started: float | None = None
        self._sampled_at: float | None = None
        self._sample: Sample | None = None
        self._produced_since = 0
        self._full: deque[int] = deque(maxlen=_FULL_SAMPLES)
        self._full_ranks = 0

    # -- events -------------------------------------------------------------------------------------------------------

    def arrived(self, at: float, rid: str, prompt_tokens: int, streams: bool = True) -> None:
        """A request was sent to a rank."""
        if self._started is None:
            self._started = at
        bucket = self._buckets.at(at)
        bucket.arrivals += 1
        self._prompt.add(prompt_tokens)
        request = self._open[rid] = _Open(at, streams)
        if streams:
            self._silent[rid] = request
        if len(self._open) > _MOST_OPEN:
            self.aborted(at, next(iter(self._open)))
        self.demand.add(at, self._output.mean)

    def first_token(self, at: float, rid: str) -> None:
        """Its first output has come."""
        request = self._silent.pop(rid, None) or self._overdue.pop(rid, None)
        if request is None:
            return
        request.first = at
        ttft = at - request.arrived
        self._buckets.at(at).ttft.add(ttft)
        if not request.late:
            self._judge_first(request, at, late=self.slo.ttft_s is not None and ttft > self.slo.ttft_s)

    def produced(self, at: float, tokens: int) -> None:
        """So many output tokens came, of any requests."""
        self._buckets.at(at).produced_tokens += tokens
        self._produced_since += tokens

    def ended(self, at: float, rid: str, output_tokens: int) -> None:
        """It has all its output."""
        request = self._open.pop(rid, None)
        if request is None:
            return
        if request.first is None:
            self.first_token(at, rid)
        bucket = self._buckets.at(at)
        self._output.add(output_tokens)
        since = request.arrived if request.first is None else request.first
        further, took = max(0, output_tokens - 1), at - since
        slow = self._is_slow(request, further, took)
        if further:
            bucket.itl.add(took / further)
        if request.arrived >= self._mark:
            bucket.pace_late += slow
            bucket.pace_ok += not slow
        if slow or request.late:
            bucket.missed += 1
        else:
            bucket.attained += 1
            bucket.good_tokens += output_tokens

    def aborted(self, at: float, rid: str) -> None:
        """It ended early, by its client or by the server; it is not judged."""
        self._open.pop(rid, None)
        self._silent.pop(rid, None)
        self._overdue.pop(rid, None)

    def sampled(self, at: float, sample: Sample) -> None:
        """The ranks as they are now. Between two samples the mean of both is taken."""
        before, since = self._sample, self._sampled_at
        self._sample, self._sampled_at = sample, at
        tokens, self._produced_since = self._produced_since, 0
        bucket = self._buckets.at(at)
        least = bucket.waiting_least
        bucket.waiting_least = sample.waiting if least is None else min(least, sample.waiting)
        if before is None or since is None or at <= since:
            return
        passed, running = at - since, (before.running + sample.running) / 2
        bucket.busy_s += passed
        bucket.running_s += running * passed
        if before.ranks == sample.ranks and at - since < 5.0 and since >= self._mark:
            self.models.learn(
                ranks=sample.ranks,
                running=running,
                tokens_per_s=tokens / passed,
                kv_use=sample.kv_use,
                full=self._is_full(sample),
            )

    def _is_full(self, sample: Sample) -> bool:
        if sample.waiting < sample.ranks or sample.ranks != self._full_ranks:
            self._full.clear()
        self._full_ranks = sample.ranks
        if sample.waiting < sample.ranks:
            return False
        self._full.append(sample.running)
        most, least = max(self._full), min(self._full)
        return len(self._full) == _FULL_SAMPLES and most - least <= _STEADY * most

    def mark(self, at: float) -> None:
        """The ranks have changed: requests that arrived before `at` do not count for how the SLO is met."""
        self._mark = at
        self._buckets.clear_outcomes()

    # -- looks --------------------------------------------------------------------------------------------------------

    def snapshot(self, now: float, settings: PolicySettings) -> Snapshot | None:
        """None until the ranks were sampled."""
        sample = self._sample
        if sample is None:
            return None
        self._note_overdue(now)
        fast = list(self._buckets.last(settings.fast_window_s, now))
        slow = list(self._buckets.last(settings.slow_window_s, now))
        report = list(self._buckets.last(REPORT_WINDOW_S, now))
        age = max(1.0, now - self._started) if self._started is not None else 1.0
        fast_s, slow_s = min(settings.fast_window_s, age), min(settings.slow_window_s, age)
        tokens, running_s = sum(b.produced_tokens for b in fast), sum(b.running_s for b in fast)
        judged = sum(b.attained + b.missed for b in report)
        good = sum(b.good_tokens for b in report)
        seen = sum(b.arrivals for b in fast)
        return Snapshot(
            ranks=sample.ranks,
            slots=sample.slots,
            kv_use=sample.kv_use,
            waiting=sample.waiting,
            waiting_least=self._shortest_queue(now),
            running=sample.running,
            arrivals_now=sum(b.arrivals for b in fast[: int(NOW_S)]) / min(NOW_S, age),
            arrivals_fast=seen / fast_s,
            arrivals_slow=sum(b.arrivals for b in slow) / slow_s,
            arrivals_seen=seen,
            slow_s=slow_s,
            output_tokens=self._output.mean,
            output_spread=self._output.spread,
            prompt_tokens=self._prompt.mean,
            tokens_per_s=tokens / fast_s,
            itl_s=running_s / tokens if tokens and running_s else None,
            first_ok=sum(b.first_ok for b in slow),
            first_late=sum(b.first_late for b in slow),
            pace_ok=sum(b.pace_ok for b in slow),
            pace_late=sum(b.pace_late for b in slow),
            attainment=sum(b.attained for b in report) / judged if judged else None,
            goodput_tokens_per_s=good / min(REPORT_WINDOW_S, age),
            models=self.models.models(),
        )

    def _shortest_queue(self, now: float) -> int:
        buckets = [self._buckets.at(now), *self._buckets.last(_QUEUE_S - 1, now)]
        return min((b.waiting_least for b in buckets if b.waiting_least is not None), default=0)

    def latencies(self, now: float) -> tuple[Quantiles, Quantiles]:
        """TTFT, and mean ITL of requests, of the last minute."""
        report = list(self._buckets.last(REPORT_WINDOW_S, now))
        return _quantiles([b.ttft for b in report]), _quantiles([b.itl for b in report])

    def _note_overdue(self, now: float) -> None:
        """Streams whose first token is overdue count as late now, not when it comes."""
        limit = self.slo.ttft_s
        if limit is None:
            return
        while self._silent:
            rid, request = next(iter(self._silent.items()))
            if now - request.arrived <= limit:
                break
            self._overdue[rid] = self._silent.pop(rid)
            self._judge_first(request, now, late=True)

    def _judge_first(self, request: _Open, at: float, *, late: bool) -> None:
        request.late = late
        if request.arrived >= self._mark:
            bucket: Bucket = self._buckets.at(at)
            bucket.first_late += late
            bucket.first_ok += not late

    def _is_slow(self, request: _Open, further: int, took: float) -> bool:
        if request.streams:
            return self.slo.itl_s is not None and further > 0 and took > further * self.slo.itl_s
        if self.slo.itl_s is None:
            return False
        return took > (self.slo.ttft_s or 0.0) + further * self.slo.itl_s


def _quantiles(parts: Sequence[Durations]) -> Quantiles:
    p50, p90, p99 = Durations.quantiles(parts, _QUANTILES)
    return Quantiles(p50=p50, p90=p90, p99=p99)
