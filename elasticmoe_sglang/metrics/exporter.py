"""The metrics of the table, registered with prometheus_client and fed by what the coordinator reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elasticmoe_sglang.coordinator.observer import Observer, Recovery
from elasticmoe_sglang.coordinator.status import Operation, Phase, RankInfo, Status
from elasticmoe_sglang.metrics import table
from elasticmoe_sglang.metrics.streams import StreamMeter
from elasticmoe_sglang.metrics.table import TABLE, Metric
from elasticmoe_sglang.planner import Cause
from elasticmoe_sglang.wire.to_hmm import KINDS

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_HEALTHY, _TOLERANCE, _ADJUST = 0, 1, 2
_SETTLED_WITHIN_S = 60.0
"""The longest gap around a change is observed when every stream goes on, but no later than this."""
_ENDED = (Phase.DONE.value, Phase.FAILED.value, Phase.ROLLED_BACK.value, "unchanged")
_PHASES = ("planned", "preparing", "committing", "finishing", "total")


@dataclass(frozen=True)
class _Window:
    """The time of a change or a recovery, in seconds of the meter's clock."""

    since: float
    until: float


class Metrics(Observer):
    """Runs in the coordinator's event loop. Create it once a process and registry, after PROMETHEUS_MULTIPROC_DIR is
    set: prometheus_client reads that when it is imported.

    Args:
        model_name: the served name. ep_size: active ranks at the server's start.
        registry: None: the process's own.
    """

    def __init__(
        self,
        *,
        model_name: str,
        ep_size: int,
        streams: StreamMeter,
        registry: CollectorRegistry | None = None,
    ) -> None:
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._register(registry)
        self._cluster = {"model_name": model_name, "scope": "cluster"}
        self._streams = streams
        self._wanted = ep_size
        self._lost: set[int] = set()
        self._windows: list[_Window] = []
        self._decisions: dict[str, int] = {}
        # A series that begins with its first event has no increase at it.
        for outcome in _ENDED:
            for cause in (Cause.TARGET, Cause.RESTORE):
                self._counters[table.CHANGES.name].labels(cause=cause.value, outcome=outcome)
        for phase in _PHASES:
            self._histograms[table.CHANGE_SECONDS.name].labels(phase=phase)
        self._show_ranks(ep_size)

    def _register(self, registry: CollectorRegistry | None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram

        into = registry or REGISTRY
        for metric in TABLE:
            labels = tuple(metric.labels)
            if metric.kind == "counter":
                self._counters[metric.name] = Counter(metric.name, metric.help, labels, registry=into)
            elif metric.kind == "gauge":
                # Upstream's mode: the value that was set last, whichever process set it.
                self._gauges[metric.name] = Gauge(
                    metric.name, metric.help, labels, registry=into, multiprocess_mode="mostrecent"
                )
            else:
                self._histograms[metric.name] = Histogram(
                    metric.name, metric.help, labels, registry=into, buckets=metric.buckets
                )

    def on_operation_ended(self, operation: Operation) -> None:
        changed = bool(operation.joining or operation.retiring or operation.moves)
        outcome = operation.phase.value if changed else "unchanged"
        self._count(table.CHANGES, 1, cause=operation.cause.value, outcome=outcome)
        committed = operation.phase is Phase.DONE or operation.timings.finishing_ms is not None
        if committed and operation.cause is Cause.TARGET:
            self._wanted = operation.new_ep_size
        if not changed:
            return
        self._count(table.REQUESTS_MOVED, operation.moved_requests)
        self._count(table.REQUESTS_RECOMPUTED, operation.recomputed_requests)
        self._count(table.COLUMNS_MOVED, operation.columns_moved)
        self._count(table.BYTES_COPIED, operation.bytes_moved)
        timings = operation.timings
        for phase in _PHASES:
            spent_ms: float | None = getattr(timings, f"{phase}_ms")
            if spent_ms is not None:
                self._histograms[table.CHANGE_SECONDS.name].labels(phase=phase).observe(spent_ms / 1000)
        for pause_ms in operation.pause_ms.values():
            self._histograms[table.PAUSE_SECONDS.name].observe(pause_ms / 1000)
        self._look_later((timings.total_ms or 0.0) / 1000)

    def on_rank_lost(self, rank: int) -> None:
        self._count(table.RANK_DEATHS, 1)
        self._lost.add(rank)
        self._gauges[table.STATE.name].labels(**self._cluster).set(_ADJUST)

    def on_recovered(self, recovery: Recovery) -> None:
        self._count(table.REQUESTS_RESENT, recovery.requests_resent)
        self._count(table.RANKS_REPLACED, len(recovery.replaced))
        self._lost.difference_update(recovery.dead)
        self._show_ranks(len(recovery.ranks))
        self._histograms[table.RECOVERY_SECONDS.name].observe(recovery.seconds)
        self._look_later(recovery.seconds)

    def on_status(self, status: Status) -> None:
        self._show_ranks(status.ep_size)
        for rank in status.ranks:
            self._show_kv(rank)
            copies = sum(rank.rank in ranks for ranks in status.copies.values())
            self._gauges[table.COLUMN_COPIES.name].labels(rank=rank.rank).set(copies)
            self._gauges[table.ROUTED_TOKENS.name].labels(rank=rank.rank).set(status.routed.get(rank.rank, 0))
        memory = self._gauges[table.DEVICE_BYTES.name]
        for device in status.memory.devices:
            for kind in KINDS:
                memory.labels(device=device.device, kind=kind).set(device.by_kind.get(kind, 0))
            memory.labels(device=device.device, kind="free").set(device.budget - device.used)
        self._settle()

    def policy(
        self,
        *,
        attainment: float | None,
        goodput_tokens: float,
        desired_ranks: int | None,
        decisions_total: Mapping[str, int],
    ) -> None:
        """What the policy sees, wants and has decided; to be called again and again.

        Args:
            attainment: share of requests that met the SLO; None while there were none, which keeps the last value.
            goodput_tokens: output tokens per second of requests that met the SLO.
            desired_ranks: None: nothing was decided yet.
            decisions_total: decision -> how often it was taken since the server's start.
        """
        if attainment is not None:
            self._gauges[table.SLO_ATTAINMENT.name].set(attainment)
        self._gauges[table.GOODPUT.name].set(goodput_tokens)
        if desired_ranks is not None:
            self._gauges[table.DESIRED_RANKS.name].set(desired_ranks)
        for decision, times in decisions_total.items():
            self._count(table.DECISIONS, times - self._decisions.get(decision, 0), decision=decision)
        self._decisions = dict(decisions_total)

    def _count(self, metric: Metric, amount: float, **labels: str) -> None:
        counter = self._counters[metric.name]
        (counter.labels(**labels) if labels else counter).inc(amount)

    def _show_ranks(self, active: int) -> None:
        serving = _HEALTHY if active >= self._wanted else _TOLERANCE
        state = _ADJUST if self._lost else serving
        for metric, value in (
            (table.TOTAL_RANKS, self._wanted),
            (table.ACTIVE_RANKS, active),
            (table.STATE, state),
        ):
            self._gauges[metric.name].labels(**self._cluster).set(value)

    def _show_kv(self, rank: RankInfo) -> None:
        for kind, tokens in (("capacity", rank.kv_tokens), ("used", rank.kv_used), ("cached", rank.kv_cached)):
            self._gauges[table.KV_TOKENS.name].labels(rank=rank.rank, kind=kind).set(tokens or 0)

    def _look_later(self, seconds: float) -> None:
        """Something that took so long has just ended; look what streams noticed once they go on."""
        now = self._streams.clock()
        self._windows.append(_Window(now - seconds, now))

    def _settle(self) -> None:
        now, waiting = self._streams.clock(), []
        for window in self._windows:
            if now - window.until < _SETTLED_WITHIN_S and not self._streams.settled(window.until):
                waiting.append(window)
                continue
            gap = self._streams.longest_gap(window.since, window.until)
            if gap is not None:
                self._histograms[table.GAP_SECONDS.name].observe(gap)
            self._count(table.REQUESTS_LOST, self._streams.take_failed(window.since, window.until))
        self._windows = waiting
