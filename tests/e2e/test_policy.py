"""The policy on the real server: it measures real requests, decides, acts, and gives way to a manual request."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.load import Load, Pump, settled
from tests.helpers.shared import KEY, Shared

pytestmark = [pytest.mark.server, pytest.mark.shared("steady"), pytest.mark.timeout(300)]

QUICK = {
    "slo": "ttft=200ms,itl=2s", "min_ep_size": 1, "hold_s": 60, "forecast": False, "grow_cool_down_s": 1,
    "shrink_cool_down_s": 2, "fast_window_s": 3, "slow_window_s": 5, "drain_s": 1,
}  # fmt: skip
"""Windows of seconds, so that the test need not wait for minutes."""
BUSY = 48
"""Streams at a time: several for each of the ranks' slots, so that a queue stays."""


@pytest.fixture
def server(shared: Shared) -> Iterator[ElasticServer]:
    """Two of four ranks; afterwards the policy is off again."""
    server = shared.steady()
    yield server
    set_policy(server, autoscale="off")


def set_policy(server: ElasticServer, **values: Any) -> dict[str, Any]:
    response = server.post("/elastic_ep/policy", values)
    assert response.status_code == 200, response.text
    view: dict[str, Any] = response.json()
    return view


def policy(server: ElasticServer, limit: int = 1000) -> dict[str, Any]:
    response = server.get(f"/elastic_ep/policy?limit={limit}")
    assert response.status_code == 200, response.text
    view: dict[str, Any] = response.json()
    return view


def size(server: ElasticServer) -> int:
    return int(server.status()["ep_size"])


def actions(server: ElasticServer, action: str) -> list[dict[str, Any]]:
    return [decision for decision in policy(server)["decisions"] if decision["action"] == action]


def own_operations(server: ElasticServer) -> list[dict[str, Any]]:
    listed = server.get("/elastic_ep/operations").json()["operations"]
    return [entry for entry in listed if entry["operation_id"].startswith("policy-")]


def produces(views: list[dict[str, Any]], view: dict[str, Any]) -> bool:
    """Keep a view of the policy, and say whether it saw output tokens in its fast window."""
    views.append(view)
    return bool(view["tokens_per_s"] > 0)


def test_shadow_then_on_then_held(server: ElasticServer) -> None:
    epoch = server.status()["epoch"]
    set_policy(server, autoscale="shadow", **QUICK)
    with Load(server.url) as load:
        with Pump(load, lambda load: load.start([5, 6, 7, 8], 48), BUSY) as pump:
            settled(lambda: bool(actions(server, "grow")), 60, "the shadow wants more ranks")
            settled(lambda: (policy(server)["ttft"]["p90"] or 0) > 0.2, 60, "first tokens that came late")
            settled(lambda: policy(server)["itl"]["p50"] is not None, 60, "requests that have ended")
            views: list[dict[str, Any]] = []
            settled(lambda: produces(views, policy(server)), 60, "tokens, beside earlier tests' on this server")
            seen = views[-1]
            assert seen["attainment"] is not None
            assert seen["queue_length"] > 0 and seen["arrivals_per_s"] > 0
            assert seen["running"] > 0 and seen["itl"]["p50"] > 0 and seen["desired_ranks"] > 2
            assert not any(decision["acted"] for decision in actions(server, "grow"))
            assert server.status()["epoch"] == epoch, "the shadow has acted"

            set_policy(server, autoscale="on")
            settled(lambda: any(decision["acted"] for decision in actions(server, "grow")), 60, "it grows")
            settled(lambda: any(entry["phase"] == "done" for entry in own_operations(server)), 60, "it has grown")
            grown = own_operations(server)[-1]
            assert grown["old_ep_size"] == 2 < grown["new_ep_size"] <= RANKS and grown["error"] is None
        load.wait(pump.streams)
        assert not [stream for stream in pump.streams if stream.lost]
        settled(lambda: size(server) == 1, 90, "it shrinks to the smallest size")
        assert actions(server, "shrink")[0]["because"]

        done = server.must_scale(2)
        with Pump(load, lambda load: load.start([5, 6, 7, 8], 48), BUSY) as pump:
            settled(lambda: policy(server)["queue_length"] > RANKS, 30, "a queue")
            settled(lambda: "a manual request holds the policy" in policy(server, 1)["state"], 10, "it holds")
            mine = server.get("/elastic_ep/operations").json()["operations"][0]
            assert mine["operation_id"] == done["operation_id"] and policy(server)["held_until"] is not None
        load.wait(pump.streams)
        assert size(server) == 2


def test_the_command_shows_and_sets(server: ElasticServer) -> None:
    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", "policy", *words]
        return subprocess.run(
            [*command, "--url", server.url, "--admin-key", KEY], capture_output=True, text=True, timeout=60
        )

    done = cli("--slo", "ttft=30s,itl=9s", "--autoscale", "shadow", "--hold", "5", "--json")
    assert done.returncode == 0, done.stderr
    view = json.loads(done.stdout)
    assert (view["mode"], view["settings"]["hold_s"], view["max_ep_size"]) == ("shadow", 5.0, RANKS)
    settled(lambda: bool(policy(server)["decisions"]), 10, "a decision")
    shown = cli("--decisions", "3")
    assert shown.returncode == 0 and "decisions, newest first" in shown.stdout, shown.stderr
    refused = cli("--slo", "soon")
    assert refused.returncode == 2 and "not understood" in refused.stderr and "Traceback" not in refused.stderr
