"""The policy as plain values: the JSON of `GET /elastic_ep/policy`."""

from __future__ import annotations

import msgspec

from elasticmoe_sglang.policy.decision import Decision
from elasticmoe_sglang.policy.estimator import Quantiles
from elasticmoe_sglang.policy.settings import Autoscale, PolicySettings


class PolicyView(msgspec.Struct, frozen=True, kw_only=True):
    """The policy now.

    Attributes:
        mode: settings.autoscale.
        state: one sentence: what it does, or what it waits for.
        desired_ranks: what the policy would have; None until something was decided.
        ranks: active ranks; None until they were sampled.
        attainment: share of requests that met the SLO, of those that ended in the last minute; None: none did.
        goodput_tokens_per_s: output tokens of those.
        ttft, itl: seconds, of the last minute.
        queue_length, running: requests that wait and run, all ranks together.
        tokens_per_s, tokens_per_s_per_rank: produced in the fast window.
        held_until: Unix time; None: not held.
        decisions_total: by action, since the start.
        decisions: newest first.
    """

    settings: PolicySettings
    mode: Autoscale
    state: str
    ranks: int | None = None
    max_ep_size: int
    desired_ranks: int | None = None
    attainment: float | None = None
    goodput_tokens_per_s: float = 0.0
    ttft: Quantiles = Quantiles()
    itl: Quantiles = Quantiles()
    queue_length: int = 0
    running: int = 0
    arrivals_per_s: float = 0.0
    tokens_per_s: float = 0.0
    tokens_per_s_per_rank: float = 0.0
    held_until: float | None = None
    decisions_total: dict[str, int] = {}
    decisions: list[Decision] = []
