"""Every metric as data: what is registered and what docs/metrics.md lists are made from TABLE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)
"""Upper bounds of the buckets of a duration: from a pause of a millisecond to a preparation of minutes."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric.

    Attributes:
        name: as /metrics shows it; a counter's ends in _total.
        unit: of its value, in words.
        labels: label -> what its values are.
        buckets: upper bounds, of a histogram only.
        policy: fed by the policy only.

    Raises:
        ValueError: name and kind, or kind and buckets, do not fit.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    labels: dict[str, str]
    buckets: tuple[float, ...] = ()
    policy: bool = False

    def __post_init__(self) -> None:
        if (self.kind == "counter") != self.name.endswith("_total"):
            raise ValueError(f"{self.name}: a counter's name ends in _total, and no other's does")
        if (self.kind == "histogram") != bool(self.buckets) or list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"{self.name}: a histogram has ascending buckets, and nothing else has any")


_CLUSTER = {"model_name": "the served name of the model", "scope": "`cluster`"}
_NONE: dict[str, str] = {}

TOTAL_RANKS = Metric(
    name="sglang:elastic_ep_total_ranks",
    kind="gauge",
    unit="ranks",
    help="Ranks that were asked for last: at the start, or by the last change that was committed",
    labels=_CLUSTER,
)
ACTIVE_RANKS = Metric(
    name="sglang:elastic_ep_active_ranks", kind="gauge", unit="ranks", help="Ranks that serve", labels=_CLUSTER
)
STATE = Metric(
    name="sglang:elastic_ep_state",
    kind="gauge",
    unit="number",
    help="0: all ranks that were asked for serve; 1: fewer do, because a worker died; 2: the survivors of a worker's "
    "death are recovering. Upstream's 3 (dead) does not occur: the server ends instead",
    labels=_CLUSTER,
)
CHANGES = Metric(
    name="elasticmoe:changes_total",
    kind="counter",
    unit="operations",
    help="Changes of the EP size that have ended",
    labels={
        "cause": "what the change was for, as in its operation: `target` (asked for) or `restore` (lost ranks came "
        "back); losses are in recovery_seconds",
        "outcome": "`done`, `failed`, `rolled_back`, or `unchanged` when nothing had to change",
    },
)
CHANGE_SECONDS = Metric(
    name="elasticmoe:change_seconds",
    kind="histogram",
    unit="seconds",
    help="Duration of each phase of a change, however the change ended",
    labels={"phase": "`planned`, `preparing`, `committing`, `finishing`, or `total`"},
    buckets=SECONDS,
)
PAUSE_SECONDS = Metric(
    name="elasticmoe:pause_seconds",
    kind="histogram",
    unit="seconds",
    help="By how much a commit delayed the next batch of a rank beyond an ordinary interval; one value for each rank "
    "and change",
    labels=_NONE,
    buckets=SECONDS,
)
GAP_SECONDS = Metric(
    name="elasticmoe:longest_gap_seconds",
    kind="histogram",
    unit="seconds",
    help="The longest time between two outputs of any one streamed request that overlaps a change or a recovery; one "
    "value for each change and recovery during which requests were streamed, as soon as each of them has had an "
    "output or has ended (within a minute)",
    labels=_NONE,
    buckets=SECONDS,
)
REQUESTS_MOVED = Metric(
    name="elasticmoe:requests_moved_total",
    kind="counter",
    unit="requests",
    help="Requests that migrated from retiring ranks to others",
    labels=_NONE,
)
REQUESTS_RECOMPUTED = Metric(
    name="elasticmoe:requests_recomputed_total",
    kind="counter",
    unit="requests",
    help="Requests that moved with KV for which the ranks that took them had no room: it is computed again",
    labels=_NONE,
)
REQUESTS_RESENT = Metric(
    name="elasticmoe:requests_resent_total",
    kind="counter",
    unit="requests",
    help="Requests of dead ranks that were sent to others, with the tokens that their clients had received",
    labels=_NONE,
)
REQUESTS_LOST = Metric(
    name="elasticmoe:requests_lost_total",
    kind="counter",
    unit="requests",
    help="Requests that the server ended with an error of its own around a change or a recovery. New requests that "
    "were refused with 503, because too many waited, are not counted",
    labels=_NONE,
)
COLUMNS_MOVED = Metric(
    name="elasticmoe:columns_moved_total",
    kind="counter",
    unit="expert columns",
    help="Expert columns that ranks pulled for changes, copies too, also for changes that were rolled back",
    labels=_NONE,
)
COLUMN_COPIES = Metric(
    name="elasticmoe:column_copies",
    kind="gauge",
    unit="expert columns",
    help="Copies of expert columns on a rank beside those that it owns",
    labels={"rank": "the rank"},
)
ROUTED_TOKENS = Metric(
    name="elasticmoe:observed_routed_tokens",
    kind="gauge",
    unit="tokens",
    help="Routed tokens, over all layers, that a rank computed while routing was observed last for a rebalance; or 0",
    labels={"rank": "the rank"},
)
BYTES_COPIED = Metric(
    name="elasticmoe:bytes_copied_total",
    kind="counter",
    unit="bytes",
    help="Bytes of expert columns that were copied between devices for changes, also for those rolled back",
    labels=_NONE,
)
RANK_DEATHS = Metric(
    name="elasticmoe:rank_deaths_total",
    kind="counter",
    unit="workers",
    help="Workers of active ranks that exited unexpectedly, or were ended because they had stalled",
    labels=_NONE,
)
RANKS_REPLACED = Metric(
    name="elasticmoe:ranks_replaced_total",
    kind="counter",
    unit="workers",
    help="Lost ranks that a standby worker replaced at once: rank 0 always; any other where recovery without it had "
    "failed",
    labels=_NONE,
)
RECOVERY_SECONDS = Metric(
    name="elasticmoe:recovery_seconds",
    kind="histogram",
    unit="seconds",
    help="From the report of a worker's death until the remaining or replaced ranks serve all requests again",
    labels=_NONE,
    buckets=SECONDS,
)
DEVICE_BYTES = Metric(
    name="elasticmoe:device_bytes",
    kind="gauge",
    unit="bytes",
    help="Memory of a device by use, in the HMM's ledger; all kinds together are its budget. Keeps its values while no "
    "HMM answers",
    labels={
        "device": "number of the device",
        "kind": "`dense`, `column`, `window`, `kv`, `other`: in use; `free`: the rest of the budget",
    },
)
KV_TOKENS = Metric(
    name="elasticmoe:kv_tokens",
    kind="gauge",
    unit="tokens",
    help="KV cache of a rank; 0 where the rank is not active",
    labels={
        "rank": "number of the rank",
        "kind": "`capacity`, `used` (by running requests), `cached` (prefixes that are kept)",
    },
)
SLO_ATTAINMENT = Metric(
    name="elasticmoe:slo_attainment",
    kind="gauge",
    unit="fraction",
    help="Share of requests that met the SLO in the policy's window",
    labels=_NONE,
    policy=True,
)
GOODPUT = Metric(
    name="elasticmoe:goodput_tokens",
    kind="gauge",
    unit="tokens per second",
    help="Output tokens per second of requests that met the SLO, in the policy's window",
    labels=_NONE,
    policy=True,
)
DESIRED_RANKS = Metric(
    name="elasticmoe:policy_desired_ranks",
    kind="gauge",
    unit="ranks",
    help="The EP size that the policy wants; in shadow mode it is not asked for",
    labels=_NONE,
    policy=True,
)
DECISIONS = Metric(
    name="elasticmoe:policy_decisions_total",
    kind="counter",
    unit="decisions",
    help="Decisions of the policy",
    labels={"decision": "what was decided, in the policy's words"},
    policy=True,
)

TABLE: tuple[Metric, ...] = (
    TOTAL_RANKS,
    ACTIVE_RANKS,
    STATE,
    CHANGES,
    CHANGE_SECONDS,
    PAUSE_SECONDS,
    GAP_SECONDS,
    REQUESTS_MOVED,
    REQUESTS_RECOMPUTED,
    REQUESTS_RESENT,
    REQUESTS_LOST,
    COLUMNS_MOVED,
    COLUMN_COPIES,
    ROUTED_TOKENS,
    BYTES_COPIED,
    RANK_DEATHS,
    RANKS_REPLACED,
    RECOVERY_SECONDS,
    DEVICE_BYTES,
    KV_TOKENS,
    SLO_ATTAINMENT,
    GOODPUT,
    DESIRED_RANKS,
    DECISIONS,
)
