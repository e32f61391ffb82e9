"""The metrics of the table: what each report of the coordinator does to them, and that page and configs fit them."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.observer import Observer, Observers, Recovery, feed_status
from elasticmoe_sglang.coordinator.status import DeviceMemory, MemoryStatus, Operation, Phase, RankInfo, RankState
from elasticmoe_sglang.metrics import docs
from elasticmoe_sglang.metrics.exporter import Metrics
from elasticmoe_sglang.metrics.streams import StreamMeter
from elasticmoe_sglang.metrics.table import SECONDS, TABLE, Metric
from elasticmoe_sglang.planner import RetireRanks, ScaleTo
from tests.helpers.fake_cluster import FakeCluster

REPOSITORY = Path(__file__).resolve().parents[2]
CLUSTER = {"model_name": "tiny", "scope": "cluster"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """Metrics on a registry of their own, and streams whose clock the test moves."""

    def __init__(self, ep_size: int = 2) -> None:
        self.clock = Clock()
        self.open: dict[str, float] = {}
        self.streams = StreamMeter(lambda: list(self.open.values()), self.clock)
        self.registry = CollectorRegistry()
        self.metrics = Metrics(model_name="tiny", ep_size=ep_size, streams=self.streams, registry=self.registry)

    def value(self, name: str, **labels: Any) -> float | None:
        return self.registry.get_sample_value(name, {key: str(value) for key, value in labels.items()})

    def ranks(self) -> tuple[float | None, ...]:
        """(total, active, state)"""
        return tuple(
            self.value(f"sglang:elastic_ep_{name}", **CLUSTER) for name in ("total_ranks", "active_ranks", "state")
        )

    def output(self, stream: str, at: float) -> None:
        self.clock.now = at
        self.open[stream] = self.streams.output(self.open.get(stream))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def change(coordinator: Coordinator, target: ScaleTo | RetireRanks) -> Operation:
    async def run() -> Operation:
        operation = await coordinator.submit(target)
        return await coordinator.wait(operation.operation_id)

    return asyncio.run(run())


class Recorder(Observer):
    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def on_operation_ended(self, operation: Operation) -> None:
        self.operations.append(operation)


def recorded(cluster: FakeCluster, target: ScaleTo | RetireRanks) -> Operation:
    """What an observer of the real coordinator was told of a change."""
    recorder = Recorder()
    ended = change(cluster.coordinator(observer=recorder), target)
    assert [operation.operation_id for operation in recorder.operations] == [ended.operation_id]
    assert recorder.operations[0].phase is ended.phase
    return recorder.operations[0]


def recovery(dead: list[int], ranks: list[int], seconds: float = 0.5, resent: int = 0) -> Recovery:
    return Recovery(dead=dead, ranks=ranks, epoch=1, seconds=seconds, requests_resent=resent)


# ---- the table ----


def test_names_are_unique_and_every_metric_is_registered_as_declared(rig: Rig) -> None:
    assert len({metric.name for metric in TABLE}) == len(TABLE)
    found = {family.name: family for family in rig.registry.collect()}
    for metric in TABLE:
        family = found[metric.name.removesuffix("_total")]
        assert (family.type, family.documentation) == (metric.kind, metric.help)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "counter"},
        {"name": "elasticmoe:x_total"},
        {"kind": "histogram"},
        {"buckets": SECONDS},
        {"kind": "histogram", "buckets": (1.0, 1.0)},
    ],
)
def test_a_metric_whose_parts_do_not_fit_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="elasticmoe:x"):
        Metric(**{"name": "elasticmoe:x", "kind": "gauge", "unit": "ranks", "help": "", "labels": {}, **wrong})


def test_buckets_reach_from_milliseconds_to_minutes() -> None:
    assert SECONDS[0] == 0.001 and SECONDS[-1] == 300
    assert all(later / earlier <= 3 for earlier, later in itertools.pairwise(SECONDS))


def test_the_page_is_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(["--check", str(REPOSITORY / "docs" / "metrics.md")]) == 0, "run `make metrics-doc`"
    page = tmp_path / "metrics.md"
    assert docs.main([str(page)]) == 0
    page.write_text(page.read_text().replace("| gauge |", "| counter |", 1))
    assert docs.main(["--check", str(page)]) == 1
    assert "make metrics-doc" in capsys.readouterr().err


# ---- dashboard and alerts ----

_NAMES = re.compile(r"\b(?:elasticmoe|sglang):\w+")


def dashboard_expressions() -> Iterator[str]:
    dashboard = json.loads((REPOSITORY / "configs/grafana/elasticmoe.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (annotation["expr"] for annotation in dashboard["annotations"]["list"])


def test_dashboard_and_alerts_name_metrics_that_exist_and_all_are_shown() -> None:
    alerts = (REPOSITORY / "configs/prometheus/alerts.yml").read_text()
    shown = {name for expression in dashboard_expressions() for name in _NAMES.findall(expression)}
    series = {metric.name for metric in TABLE if metric.kind != "histogram"}
    series |= {
        f"{metric.name}_{part}" for metric in TABLE if metric.kind == "histogram" for part in ("bucket", "sum", "count")
    }
    upstream = {"sglang:generation_tokens_total"}
    assert (shown | set(_NAMES.findall(alerts))) - series == upstream
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    assert {metric.name for metric in TABLE} - shown == set()


# ---- changes ----


def test_a_change_is_counted_with_its_phases_pauses_columns_and_bytes(rig: Rig) -> None:
    operation = recorded(FakeCluster(), ScaleTo(size=4))
    assert operation.phase is Phase.DONE
    rig.metrics.on_operation_ended(operation)
    assert rig.value("elasticmoe:changes_total", cause="target", outcome="done") == 1
    assert rig.value("elasticmoe:changes_total", cause="target", outcome="failed") == 0
    assert rig.value("elasticmoe:columns_moved_total") == operation.columns_moved > 0
    assert rig.value("elasticmoe:bytes_copied_total") == operation.bytes_moved > 0
    for phase in ("planned", "preparing", "committing", "finishing", "total"):
        spent = getattr(operation.timings, f"{phase}_ms")
        assert rig.value("elasticmoe:change_seconds_count", phase=phase) == 1
        assert rig.value("elasticmoe:change_seconds_sum", phase=phase) == pytest.approx(spent / 1000)
    # The survivors report pauses of 1 and 2 ms.
    assert rig.value("elasticmoe:pause_seconds_count") == 2
    assert rig.value("elasticmoe:pause_seconds_sum") == pytest.approx(0.003)
    assert rig.value("elasticmoe:pause_seconds_bucket", le="0.001") == 1


def test_requests_that_moved_are_counted(rig: Rig) -> None:
    rig.metrics.on_operation_ended(recorded(FakeCluster(active=(0, 1, 2)), RetireRanks(ranks=(1, 2))))
    assert rig.value("elasticmoe:requests_moved_total") == 6
    assert rig.value("elasticmoe:requests_recomputed_total") == 2


def test_ranks_that_were_replaced_are_counted(rig: Rig) -> None:
    rig.metrics.on_rank_lost(0)
    rig.metrics.on_recovered(recovery([0], [0, 1]))
    assert rig.value("elasticmoe:ranks_replaced_total") == 1


def test_a_change_that_was_rolled_back_leaves_the_size_that_was_asked_for(rig: Rig) -> None:
    rig.metrics.on_operation_ended(recorded(FakeCluster(faults={"boot 2": "raise_before"}), ScaleTo(size=4)))
    assert rig.value("elasticmoe:changes_total", cause="target", outcome="rolled_back") == 1
    assert rig.value("elasticmoe:change_seconds_count", phase="finishing") == 0
    rig.metrics.on_status(status(rig, active=2))
    assert rig.ranks() == (2, 2, 0)


def test_a_change_that_failed_after_its_commit_counts_as_failed_and_sets_the_size(rig: Rig) -> None:
    operation = recorded(FakeCluster(faults={"hmm.commit": "raise_before"}), ScaleTo(size=3))
    assert operation.phase is Phase.FAILED
    rig.metrics.on_operation_ended(operation)
    assert rig.value("elasticmoe:changes_total", cause="target", outcome="failed") == 1
    rig.metrics.on_status(status(rig, active=3))
    assert rig.ranks() == (3, 3, 0)


def test_nothing_to_change_is_no_change(rig: Rig) -> None:
    rig.metrics.on_operation_ended(recorded(FakeCluster(), ScaleTo(size=2)))
    assert rig.value("elasticmoe:changes_total", cause="target", outcome="unchanged") == 1
    assert rig.value("elasticmoe:changes_total", cause="target", outcome="done") == 0
    assert rig.value("elasticmoe:change_seconds_count", phase="total") == 0


# ---- deaths ----


def test_a_death_is_counted_and_the_state_follows_the_recovery() -> None:
    rig = Rig(ep_size=4)
    assert rig.ranks() == (4, 4, 0)
    rig.metrics.on_rank_lost(3)
    rig.metrics.on_rank_lost(2)
    assert rig.value("elasticmoe:rank_deaths_total") == 2
    assert rig.ranks() == (4, 4, 2)
    rig.metrics.on_recovered(recovery([3], [0, 1, 2], seconds=0.3, resent=5))
    assert rig.ranks() == (4, 3, 2), "rank 2 is still being recovered"
    rig.metrics.on_status(status(rig, active=3))
    assert rig.ranks() == (4, 3, 2)
    rig.metrics.on_recovered(recovery([2], [0, 1], seconds=0.6, resent=1))
    assert rig.ranks() == (4, 2, 1)
    assert rig.value("elasticmoe:requests_resent_total") == 6
    assert rig.value("elasticmoe:ranks_replaced_total") == 0
    assert rig.value("elasticmoe:recovery_seconds_count") == 2
    assert rig.value("elasticmoe:recovery_seconds_sum") == pytest.approx(0.9)
    # Whoever asks for the size that is there is content with it.
    rig.metrics.on_operation_ended(recorded(FakeCluster(), ScaleTo(size=2)))
    rig.metrics.on_status(status(rig, active=2))
    assert rig.ranks() == (2, 2, 0)


def test_a_rank_that_was_replaced_leaves_the_state_healthy(rig: Rig) -> None:
    rig.metrics.on_rank_lost(0)
    rig.metrics.on_recovered(recovery([0], [0, 1]))
    assert rig.ranks() == (2, 2, 0)


# ---- status ----


def status(rig: Rig, *, active: int, by_kind: dict[str, int] | None = None) -> Any:
    cluster = FakeCluster(active=tuple(range(active)))
    found = asyncio.run(cluster.coordinator().status())
    ranks = [
        RankInfo(rank=rank, state=RankState.ACTIVE, device=rank, kv_tokens=100, kv_used=10 + rank, kv_cached=20)
        if rank < active
        else RankInfo(rank=rank, state=RankState.INACTIVE, device=rank)
        for rank in range(4)
    ]
    if by_kind is not None:
        device = DeviceMemory(device=0, budget=1000, used=sum(by_kind.values()), peak=900, by_kind=by_kind)
        found = msgspec.structs.replace(found, memory=MemoryStatus(available=True, devices=[device]))
    return msgspec.structs.replace(found, ranks=ranks)


def test_memory_and_kv_are_those_of_the_status(rig: Rig) -> None:
    rig.metrics.on_status(status(rig, active=2, by_kind={"dense": 300, "column": 200, "kv": 100}))

    def memory() -> dict[str, float | None]:
        kinds = ("dense", "column", "window", "kv", "other", "free")
        return {kind: rig.value("elasticmoe:device_bytes", device=0, kind=kind) for kind in kinds}

    assert memory() == {"dense": 300, "column": 200, "window": 0, "kv": 100, "other": 0, "free": 400}
    assert rig.value("elasticmoe:kv_tokens", rank=1, kind="used") == 11
    rig.metrics.on_status(status(rig, active=1, by_kind={"dense": 300}))
    assert memory() == {"dense": 300, "column": 0, "window": 0, "kv": 0, "other": 0, "free": 700}
    tokens = {kind: rig.value("elasticmoe:kv_tokens", rank=1, kind=kind) for kind in ("capacity", "used", "cached")}
    assert tokens == {"capacity": 0, "used": 0, "cached": 0}, "the rank is inactive now"
    # While no HMM answers the ledger's last values stay.
    unknown = msgspec.structs.replace(status(rig, active=1), memory=MemoryStatus(available=False, error="no HMM"))
    rig.metrics.on_status(unknown)
    assert memory()["dense"] == 300


def test_the_state_is_reported_again_and_again() -> None:
    async def main() -> list[int]:
        seen: list[int] = []

        class Sizes(Observer):
            def on_status(self, status: Any) -> None:
                seen.append(status.ep_size)

        coordinator = FakeCluster(active=(0, 1, 2)).coordinator()
        task = asyncio.create_task(feed_status(coordinator.status, Sizes(), every_s=0.001))
        while len(seen) < 3 and not task.done():
            await asyncio.sleep(0.001)
        task.cancel()
        return seen

    assert asyncio.run(main())[:3] == [3, 3, 3]


def test_an_observer_that_fails_hides_nothing_from_the_others(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Observer):
        def on_operation_ended(self, operation: Operation) -> None:
            raise OSError("no space left on device")

    recorder = Recorder()
    with caplog.at_level(logging.ERROR):
        ended = change(FakeCluster().coordinator(observer=Observers([Broken(), recorder])), ScaleTo(size=3))
    assert ended.phase is Phase.DONE and len(recorder.operations) == 1
    assert "Broken failed" in caplog.text and "no space left" in caplog.text


# ---- what streams notice ----


def test_the_longest_gap_around_a_change_is_observed_once_every_stream_goes_on(rig: Rig) -> None:
    rig.output("a", 1000.0)
    rig.output("b", 1000.0)
    rig.output("a", 1000.3)
    for tick in range(1, 30):  # a second of ordinary outputs
        rig.output("a", 1000.3 + tick * 0.03)
    operation = recorded(FakeCluster(), ScaleTo(size=3))
    timings = msgspec.structs.replace(operation.timings, total_ms=500.0)
    rig.clock.now = 1001.5
    rig.metrics.on_operation_ended(msgspec.structs.replace(operation, timings=timings))
    rig.metrics.on_status(status(rig, active=3))
    assert rig.value("elasticmoe:longest_gap_seconds_count") == 0, "neither stream has had an output since"
    rig.output("a", 1001.6)
    rig.metrics.on_status(status(rig, active=3))
    assert rig.value("elasticmoe:longest_gap_seconds_count") == 0
    rig.output("b", 1001.9)
    rig.metrics.on_status(status(rig, active=3))
    assert rig.value("elasticmoe:longest_gap_seconds_count") == 1
    assert rig.value("elasticmoe:longest_gap_seconds_sum") == pytest.approx(1.9)
    rig.metrics.on_status(status(rig, active=3))
    assert rig.value("elasticmoe:longest_gap_seconds_count") == 1


def test_a_stream_that_hangs_counts_after_a_minute_and_gaps_elsewhere_do_not(rig: Rig) -> None:
    rig.output("early", 1000.0)
    rig.output("early", 1009.0)  # a gap of 9 s that ended before
    rig.output("hangs", 1020.0)
    rig.clock.now = 1021.0
    rig.metrics.on_rank_lost(1)
    rig.clock.now = 1021.5
    rig.open.pop("early")  # it has ended
    rig.metrics.on_recovered(recovery([1], [0], seconds=0.5))
    rig.clock.now = 1080.0
    rig.metrics.on_status(status(rig, active=1))
    assert rig.value("elasticmoe:longest_gap_seconds_count") == 0
    rig.clock.now = 1082.0
    rig.metrics.on_status(status(rig, active=1))
    assert rig.value("elasticmoe:longest_gap_seconds_sum") == pytest.approx(62.0)


@hypothesis.given(
    outputs=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 0.4)), min_size=1, max_size=60),
    since=st.floats(0.0, 1.0),
    until=st.floats(0.0, 1.0),
)
def test_the_longest_gap_is_that_of_a_reference_to_a_tenth_of_a_second(
    outputs: list[tuple[str, float]], since: float, until: float
) -> None:
    clock, gaps, last = Clock(), list[tuple[float, float]](), dict[str, float]()
    streams, began_at = StreamMeter(lambda: list(last.values()), clock), clock.now
    for stream, pause in outputs:
        clock.now += pause
        if stream in last:
            gaps.append((last[stream], clock.now))
        last[stream] = streams.output(last.get(stream))
    # A change is looked at when it has ended, by a clock that does not stop.
    since, until = (began_at + part * (clock.now - began_at) for part in sorted((since, until)))
    gaps += [(began, clock.now) for began in last.values()]  # they have not ended

    def reference(slack: float) -> float:
        return max((end - began for began, end in gaps if end >= since - slack and began <= until + slack), default=0.0)

    assert reference(0.0) - 1e-6 <= (streams.longest_gap(since, until) or 0.0) <= reference(0.101) + 1e-6


def test_without_streams_there_is_no_gap(rig: Rig) -> None:
    rig.metrics.on_operation_ended(recorded(FakeCluster(), ScaleTo(size=3)))
    rig.metrics.on_status(status(rig, active=3))
    assert rig.value("elasticmoe:longest_gap_seconds_count") == 0


def test_requests_that_the_server_failed_around_a_change_are_lost_and_counted_once(rig: Rig) -> None:
    rig.clock.now = 900.0
    rig.streams.failed(899.0, refused=False)  # long before
    rig.clock.now = 1000.2
    rig.streams.failed(990.0, refused=False)
    rig.streams.failed(990.0, refused=True)  # it had waited on a rank that retired
    rig.streams.failed(1000.1, refused=True)  # a new one, told to come again
    rig.clock.now = 1000.5
    rig.metrics.on_recovered(recovery([1], [0], seconds=0.5))
    rig.metrics.on_recovered(recovery([2], [0], seconds=0.5))
    rig.streams.failed(1000.4, refused=False)
    rig.metrics.on_status(status(rig, active=1))
    assert rig.value("elasticmoe:requests_lost_total") == 3
    rig.streams.failed(1000.6, refused=False)  # it came afterwards
    rig.metrics.on_status(status(rig, active=1))
    assert rig.value("elasticmoe:requests_lost_total") == 3


# ---- the policy ----


def test_the_policys_values_are_shown_and_its_decisions_counted(rig: Rig) -> None:
    rig.metrics.policy(attainment=0.93, goodput_tokens=1200.0, desired_ranks=3, decisions_total={"grow": 1, "hold": 4})
    rig.metrics.policy(attainment=None, goodput_tokens=0.0, desired_ranks=None, decisions_total={"grow": 1, "hold": 5})
    assert rig.value("elasticmoe:slo_attainment") == 0.93
    assert rig.value("elasticmoe:goodput_tokens") == 0
    assert rig.value("elasticmoe:policy_desired_ranks") == 3
    assert rig.value("elasticmoe:policy_decisions_total", decision="hold") == 5
    assert rig.value("elasticmoe:policy_decisions_total", decision="grow") == 1


# ---- as SGLang serves them ----

_SERVED = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from elasticmoe_sglang.metrics.exporter import Metrics
from elasticmoe_sglang.metrics.streams import StreamMeter
metrics = Metrics(model_name="tiny", ep_size=2, streams=StreamMeter(list))
metrics.on_rank_lost(1)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


@pytest.mark.process
def test_in_the_multiprocess_mode_only_what_has_a_value_is_shown(tmp_path: Path) -> None:
    """SGLang's /metrics collects files; prometheus_client writes them where this variable is set as it is imported."""
    shown = subprocess.run(
        [sys.executable, "-c", _SERVED],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert 'sglang:elastic_ep_state{model_name="tiny",scope="cluster"} 2.0\n' in shown
    assert 'sglang:elastic_ep_active_ranks{model_name="tiny",scope="cluster"} 2.0\n' in shown
    assert "elasticmoe:rank_deaths_total 1.0\n" in shown
    assert 'elasticmoe:changes_total{cause="target",outcome="rolled_back"} 0.0\n' in shown
    assert 'elasticmoe:change_seconds_bucket{le="0.001",phase="preparing"} 0.0\n' in shown
    samples = [line for line in shown.splitlines() if not line.startswith("#")]
    assert not [line for line in samples if "slo_" in line or "goodput" in line or "policy" in line], "no policy runs"


def test_copies_and_shares_of_the_tokens_are_those_of_the_status(rig: Rig) -> None:
    rig.metrics.on_status(status(rig, active=2))
    copies = [rig.value("elasticmoe:column_copies", rank=rank) for rank in range(3)]
    assert copies == [0, 0, 0] and rig.value("elasticmoe:observed_routed_tokens", rank=0) == 0, "never observed"
    found = msgspec.structs.replace(status(rig, active=2), copies={3: [0, 1], 5: [1]}, routed={0: 700, 1: 900})
    rig.metrics.on_status(found)
    assert [rig.value("elasticmoe:column_copies", rank=rank) for rank in range(3)] == [1, 2, 0]
    assert [rig.value("elasticmoe:observed_routed_tokens", rank=rank) for rank in range(3)] == [700, 900, 0]
    rig.metrics.on_status(msgspec.structs.replace(found, copies={}))
    assert [rig.value("elasticmoe:column_copies", rank=rank) for rank in range(3)] == [0, 0, 0]
