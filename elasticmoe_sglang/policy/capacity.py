"""What one rank can do: learned from how ITL grows with the number of running requests, and from ranks that were full.

With b running requests a rank's ITL is about a + c * b, so it makes b / (a + c * b) tokens a second. The SLO, the
scheduler's slots and KV memory limit b.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import msgspec

_FORGET = 1 / 180
"""Weight of a new sample, one a second, against what was learned: a memory of some minutes."""
_PRIOR_SPREAD = 0.1
"""As long as b varies by less than this share, half of the ITL is taken to grow with b."""
_ITL_MARGIN = 0.9
"""Mean ITL aimed at, of the limit: requests differ."""
_KV_FULL = 0.95
_FULL_SAMPLES = 3.0


class RankModel(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned at one size.

    Attributes:
        base_s, slope_s: ITL is base_s + slope_s * running requests of a rank.
        kv_per_request: share of a rank's KV that one running request takes; 0: not known.
        full_tokens_per_s: of a rank while every rank's queue held requests; None: not seen.
        samples: how much the model is based on.
    """

    base_s: float
    slope_s: float
    kv_per_request: float = 0.0
    full_tokens_per_s: float | None = None
    samples: float = 0.0


class RankCapacity(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank can do within the SLO.

    Attributes:
        tokens_per_s: output tokens.
        running: requests at a time; None: no limit is known.
    """

    tokens_per_s: float
    running: float | None


class _Fit:
    """Weighted sums for a line through (running, ITL), newer samples weighing more."""

    def __init__(self) -> None:
        self.samples = 0.0
        self._mean_b = self._mean_y = self._var_b = self._cov = 0.0
        self.kv_per_request = 0.0
        self._full = 0.0
        self._full_samples = 0.0

    def add(self, running: float, itl_s: float, kv_per_request: float | None) -> None:
        self.samples = min(self.samples + 1.0, 1 / _FORGET)
        weight = max(1.0 / self.samples, _FORGET)
        delta_b, delta_y = running - self._mean_b, itl_s - self._mean_y
        self._mean_b += weight * delta_b
        self._mean_y += weight * delta_y
        self._var_b = (1 - weight) * (self._var_b + weight * delta_b * delta_b)
        self._cov = (1 - weight) * (self._cov + weight * delta_b * delta_y)
        if kv_per_request is not None:
            self.kv_per_request += weight * (kv_per_request - self.kv_per_request)

    def add_full(self, tokens_per_s: float) -> None:
        self._full_samples = min(self._full_samples + 1.0, 60.0)
        self._full += (tokens_per_s - self._full) / min(self._full_samples, 20.0)

    def model(self) -> RankModel | None:
        if not self.samples:
            return None
        prior_slope = 0.5 * self._mean_y / self._mean_b
        prior_var = (_PRIOR_SPREAD * self._mean_b) ** 2
        slope = (self._cov + prior_slope * prior_var) / (self._var_b + prior_var)
        slope = min(max(slope, 0.0), self._mean_y / self._mean_b)
        return RankModel(
            base_s=self._mean_y - slope * self._mean_b,
            slope_s=slope,
            kv_per_request=self.kv_per_request,
            full_tokens_per_s=self._full if self._full_samples >= _FULL_SAMPLES else None,
            samples=self.samples,
        )


class CapacityLearner:
    """Receives samples of a serving server, at every size that it has."""

    def __init__(self) -> None:
        self._fits: dict[int, _Fit] = {}

    def learn(
        self,
        *,
        ranks: int,
        running: float,
        tokens_per_s: float,
        kv_use: float | None,
        full: bool,
    ) -> None:
        """One sample, over about a second.

        Args:
            running: mean of requests that ran, on all ranks together.
            tokens_per_s: output tokens of all ranks.
            kv_use: used share of the ranks' KV.
            full: requests waited on every rank all the time.
        """
        if running <= 0 or tokens_per_s <= 0:
            return
        fit = self._fits.setdefault(ranks, _Fit())
        share = running / ranks
        fit.add(share, running / tokens_per_s, None if kv_use is None else kv_use / share)
        if full:
            fit.add_full(tokens_per_s / ranks)

    def models(self) -> dict[int, RankModel]:
        """By size."""
        return {size: model for size, fit in self._fits.items() if (model := fit.model()) is not None}


def rank_capacity(
    models: Mapping[int, RankModel], size: int, *, itl_limit_s: float | None, slots: int | None
) -> RankCapacity | None:
    """What each of `size` ranks can do, by the model of the nearest size that was seen; None: nothing was seen.

    Args:
        slots: requests that a rank's scheduler runs at a time.
    """
    model = _nearest(models, size)
    if model is None:
        return None
    limits: list[float] = [] if slots is None else [float(slots)]
    if model.kv_per_request > 0:
        limits.append(_KV_FULL / model.kv_per_request)
    if itl_limit_s is not None and model.slope_s > 0:
        limits.append((_ITL_MARGIN * itl_limit_s - model.base_s) / model.slope_s)
    running = max(1.0, min(limits)) if limits else None
    if running is not None:
        rate = running / (model.base_s + model.slope_s * running)
    else:
        rate = 1 / model.slope_s if model.slope_s > 0 else math.inf
    if model.full_tokens_per_s is not None:
        rate = min(rate, model.full_tokens_per_s)
    return None if math.isinf(rate) else RankCapacity(tokens_per_s=rate, running=running)


def _nearest(models: Mapping[int, RankModel], size: int) -> RankModel | None:
    known: Iterable[int] = models
    best = min(known, key=lambda seen: (abs(math.log(seen / size)), seen), default=None)
    return None if best is None else models[best]
