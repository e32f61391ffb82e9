"""Metrics of a live server through changes and a kill, as the real Prometheus sees them: dashboard and alerts too."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_sglang.metrics.table import TABLE
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import change
from tests.helpers.footprint import loads_of
from tests.helpers.load import Pump, settled
from tests.helpers.prometheus import ALERTS, CONFIG, Prometheus, need_prometheus, panels, prometheus
from tests.helpers.shared import Faulty, Shared

STREAMS = 4
PHASES = ("preparing", "committing", "finishing")
SEEN_WITHIN_S = 60.0
_COMPARISON = re.compile(r" (>|<|==) (?=[\d.]+$)")


@pytest.fixture
def faulty(shared: Shared) -> Faulty:
    faulty = shared.faulty()
    faulty.at_two()
    return faulty


def counters(seen: Prometheus) -> dict[str, float]:
    """What the table's counters and counts are now, labels summed up."""
    names = [metric.name for metric in TABLE if metric.kind == "counter"]
    names += [f"{metric.name}_count" for metric in TABLE if metric.kind == "histogram"]
    return {name: seen.value(f"sum({name})") for name in names}


def recovered(seen: Prometheus, before: dict[str, float]) -> bool:
    name = "elasticmoe:recovery_seconds_count"
    return seen.value(name) > before[name]


def gauges(seen: Prometheus) -> list[float]:
    return [seen.value(f"sglang:elastic_ep_{name}") for name in ("total_ranks", "active_ranks", "state")]


def operations_since(server: ElasticServer, began: float) -> list[dict[str, Any]]:
    """The changes that have ended, a target's or a restore's; a recovery has metrics of its own."""
    listed = server.get("/elastic_ep/operations").json()["operations"]
    ended = [o for o in listed if o["created_at"] >= began and o["phase"] in ("done", "failed", "rolled_back")]
    return [o for o in ended if o["cause"] != "loss"]


@pytest.mark.shared("faulty")
def test_prometheus_sees_changes_and_a_kill(faulty: Faulty, tmp_path: Path) -> None:
    need_prometheus()
    server = faulty.server
    with prometheus(server.url.removeprefix("http://"), tmp_path) as seen:
        # Nothing to change, but two ranks are what is asked for now, whatever was before; and all that was is seen.
        unchanged = 'sum(elasticmoe:changes_total{outcome="unchanged"})'
        earlier = seen.value(unchanged)
        change(server, 2)
        settled(lambda: seen.value(unchanged) > earlier, SEEN_WITHIN_S, "the request is seen")
        settled(lambda: gauges(seen) == [2, 2, 0], SEEN_WITHIN_S, "two ranks are seen")
        before, began = counters(seen), time.time()
        with Pump(faulty.load, faulty.request, STREAMS) as pump:
            settled(lambda: all(len(s.ids) > 2 for s in pump.streams) and pump.streams, 60, "streams decode")
            for size in (3, 2, 3):
                change(server, size)
            settled(lambda: gauges(seen) == [3, 3, 0], SEEN_WITHIN_S, "three ranks are seen")
            settled(
                lambda: loads_of(server).get(2, {}).get("num_running_reqs", 0) > 0,
                60,
                "a request runs on the rank that is to die",
            )
            os.kill(server.worker_pids()[2], signal.SIGKILL)
            # Without its rank at first; where the server brings the size back, with all of them soon.
            settled(
                lambda: gauges(seen) in ([3, 2, 1], [3, 3, 0]) and recovered(seen, before), SEEN_WITHIN_S, "the loss"
            )
            # The gaps around three changes and a recovery.
            name = "elasticmoe:longest_gap_seconds_count"
            settled(lambda: seen.value(name) >= before[name] + 4, SEEN_WITHIN_S, "all gaps are seen")
            expressions_have_data(seen)
            alerts_are_evaluated(seen)
        faulty.load.wait(pump.streams)
        operations = operations_since(server, began)
        count = len(operations)
        settled(
            lambda: seen.value("sum(elasticmoe:changes_total)") >= before["elasticmoe:changes_total"] + count, 20, "all"
        )
        after = counters(seen)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["elasticmoe:changes_total"] == count >= 3
    assert grown["elasticmoe:columns_moved_total"] == sum(operation["columns_moved"] for operation in operations)
    assert grown["elasticmoe:bytes_copied_total"] == sum(operation["bytes_moved"] for operation in operations)
    assert grown["elasticmoe:requests_moved_total"] == sum(operation["moved_requests"] for operation in operations)
    assert grown["elasticmoe:pause_seconds_count"] == sum(len(operation["pause_ms"]) for operation in operations)
    assert grown["elasticmoe:change_seconds_count"] == count * len(("planned", *PHASES, "total"))
    assert grown["elasticmoe:rank_deaths_total"] == grown["elasticmoe:recovery_seconds_count"] == 1
    assert grown["elasticmoe:requests_resent_total"] > 0
    assert grown["elasticmoe:requests_lost_total"] == sum(stream.lost for stream in pump.streams) == 0
    for stream in pump.streams:
        stream.check(faulty.expected[stream.rid])


def expressions_have_data(seen: Prometheus) -> None:
    """Every panel's expression; those of the policy, which does not run, need only be right."""
    shown = list(panels())
    assert len(shown) > 20
    # Panels that show what a minute's increase was need two scrapes of the last event.
    for title, expression, policy in shown:
        seen.query(expression)
        if not policy:
            settled(lambda expression=expression: seen.values(expression), 20, f"{title}: {expression} has data")


def alerts_are_evaluated(seen: Prometheus) -> None:
    rules = seen.rules()
    assert {name: rule["lastError"] for name, rule in rules.items() if rule["health"] != "ok"} == {}
    for name, rule in rules.items():
        compared, count = _COMPARISON.subn(r" \1 bool ", rule["query"])
        if "elasticmoe:slo_" in compared or "elasticmoe:policy_" in compared:
            continue
        assert count == 1, f"{name}: {compared}"
        assert seen.values(compared), f"{name}: {compared} has no data"
    settled(lambda: seen.rules()["ElasticMoERankDied"]["state"] == "firing", 20, "the death is an alert")
    states = {name: rule["state"] for name, rule in seen.rules().items()}
    assert states["ElasticMoEFewerRanksThanAsked"] in ("pending", "inactive"), "it waits five minutes"
    assert states["ElasticMoERequestsLost"] == states["ElasticMoEChangeFailed"] == "inactive"


@pytest.mark.toolchain
def test_promtool_accepts_the_configuration_and_the_alerts() -> None:
    need_prometheus()
    for what, path in (("config", CONFIG), ("rules", ALERTS)):
        checked = subprocess.run(["promtool", "check", what, str(path)], capture_output=True, text=True, timeout=60)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{ALERTS.read_text().count('- alert:')} rules found" in checked.stdout
