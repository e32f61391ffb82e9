"""Placing columns by load: the planner's properties, and the request over the fake cluster."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.api.types import RebalanceAnswer, parse_rebalance_request
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.coordinator.routing import LEAST_PER_COLUMN
from elasticmoe_sglang.coordinator.status import Phase
from elasticmoe_sglang.errors import PlanError, UserInputError
from elasticmoe_sglang.planner import (
    Cause,
    Placement,
    Rebalance,
    ScaleTo,
    View,
    imbalance,
    initial_placement,
    plan_target,
    rank_loads,
)
from elasticmoe_sglang.planner.rebalance import balanced
from tests.helpers.fake_api import serving
from tests.helpers.fake_cluster import FakeCluster

COLUMNS = 8
SKEWED = [8 * count for count in (800, 400, 266, 200, 160, 133, 114, 100)]


def view_of(placement: Placement, ranks: tuple[int, ...]) -> View:
    return View(membership=Membership(ranks=ranks, epoch=3, capacity=max(ranks) + 1), placement=placement)


@st.composite
def placed(draw: st.DrawFn) -> tuple[Placement, tuple[int, ...], list[float]]:
    ranks = tuple(sorted(draw(st.sets(st.integers(0, 7), min_size=1, max_size=5))))
    columns = draw(st.integers(len(ranks), 24))
    owners = list(initial_placement(columns, ranks).owners)
    draw(st.randoms(use_true_random=False)).shuffle(owners)
    load = draw(st.lists(st.floats(0, 1e6), min_size=columns, max_size=columns))
    return Placement(owners=tuple(owners)), ranks, load


@given(placed())
def test_numbers_stay_and_the_fullest_rank_never_gets_fuller(
    case: tuple[Placement, tuple[int, ...], list[float]],
) -> None:
    placement, ranks, load = case
    after = balanced(placement, ranks, load)
    assert after.counts() == placement.counts()
    assert imbalance(after, ranks, load) <= imbalance(placement, ranks, load) * (1 + 1e-9)
    assert balanced(placement, ranks, load) == after, "the same arguments, the same placement"


@given(placed())
def test_a_balanced_placement_stays(case: tuple[Placement, tuple[int, ...], list[float]]) -> None:
    placement, ranks, load = case
    once = balanced(placement, ranks, load)
    assert balanced(once, ranks, load) == once


@pytest.mark.parametrize(("columns", "size"), [(16, 2), (64, 4), (128, 8), (256, 32)])
def test_popularity_of_one_over_rank_is_shared_out_with_few_moves(columns: int, size: int) -> None:
    """What is left over is one column's load: no placement of whole columns can divide the most popular one."""
    ranks, load = tuple(range(size)), [1 / (1 + column) for column in range(columns)]
    placement = initial_placement(columns, ranks)
    plan = plan_target(view_of(placement, ranks), Rebalance(load=tuple(load)))
    before, after = imbalance(placement, ranks, load), imbalance(plan.after.placement, ranks, load)
    mean = sum(load) / size
    assert before > 1.5 and after <= max(1.05, load[0] / mean + 0.25), (before, after)
    assert len(plan.moves) < columns / 2
    assert plan.cause is Cause.TARGET and plan.joining == plan.retiring == () and plan.survivors == ranks
    assert plan.after.epoch == plan.before.epoch + 1


def test_loads_add_up() -> None:
    placement = Placement(owners=(0, 2, 2, 0))
    assert rank_loads(placement, (0, 2), [1, 2, 3, 4]) == {0: 5, 2: 5}
    assert imbalance(placement, (0, 2), [8, 0, 0, 0]) == 2.0
    assert imbalance(placement, (0, 2), [0, 0, 0, 0]) == 1.0


def test_nothing_to_swap_is_no_change() -> None:
    view = view_of(Placement(owners=(0, 0, 0)), (0,))
    assert plan_target(view, Rebalance(load=(5.0, 1.0, 1.0))).is_noop


@pytest.mark.parametrize("load", [(1.0, 2.0), (1.0, -1.0, 2.0)])
def test_loads_that_do_not_fit_are_refused(load: tuple[float, ...]) -> None:
    with pytest.raises(PlanError, match="3 expert columns"):
        plan_target(view_of(Placement(owners=(0, 1, 1)), (0, 1)), Rebalance(load=load))


# -- the request -----------------------------------------------------------------------------------------------------


def ask(client: TestClient, **body: Any) -> RebalanceAnswer:
    answer = client.post("/elastic_ep/rebalance", json={"observe_s": 0.1, **body})
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=RebalanceAnswer)


def test_columns_move_by_what_was_observed() -> None:
    cluster = FakeCluster(columns=COLUMNS, popularity=SKEWED)
    before = cluster.committed.placement
    with serving(cluster) as client:
        answer = ask(client, wait=True)
        assert answer.operation is not None and answer.operation.phase is Phase.DONE
        assert answer.observed_tokens == sum(SKEWED)
        assert answer.imbalance == pytest.approx(imbalance(before, (0, 1), SKEWED))
        after = cluster.committed.placement
        assert answer.expected_imbalance == pytest.approx(imbalance(after, (0, 1), SKEWED)) and after != before
        assert answer.columns == answer.operation.columns_moved == len(answer.operation.moves) > 0
        assert sum(answer.expected_rank_loads.values()) == pytest.approx(1.0)
        assert Counter(after.owners) == Counter(before.owners)
        assert answer.operation.target == {"rebalance": sum(SKEWED)} and answer.operation.old_ep_size == 2
        again = ask(client)
        assert again.operation is None and again.note and again.columns == 0


def test_a_dry_run_moves_nothing() -> None:
    cluster = FakeCluster(columns=COLUMNS, popularity=SKEWED)
    with serving(cluster) as client:
        answer = ask(client, dry_run=True)
        assert answer.operation is None and answer.columns > 0 and answer.expected_imbalance < answer.imbalance
        assert ask(client, least_gain=1.5).note.startswith("the fullest rank's load would fall by 0.")
        assert client.get("/elastic_ep/operations").json() == {"operations": []}


def test_a_repeated_request_returns_the_same_operation() -> None:
    cluster = FakeCluster(columns=COLUMNS, popularity=SKEWED)
    with serving(cluster) as client:
        first = ask(client, operation_id="once", wait=True)
        again = ask(client, operation_id="once")
        assert again.operation is not None and first.operation is not None
        assert again.operation.created_at == first.operation.created_at
        assert (again.imbalance, again.columns) == (first.imbalance, first.columns)
        taken = client.post("/scale_elastic_ep", json={"new_ep_size": 3, "operation_id": "once"})
        assert taken.status_code == 409 and "another target" in taken.json()["error"]
        assert client.post("/scale_elastic_ep", json={"new_ep_size": 3, "operation_id": "up"}).status_code == 200
        other = client.post("/elastic_ep/rebalance", json={"operation_id": "up"})
        assert other.status_code == 409 and "new_ep_size" in other.json()["error"]


@pytest.mark.parametrize(
    ("cluster", "says"),
    [
        (FakeCluster(columns=COLUMNS), "does not count"),
        (FakeCluster(columns=COLUMNS, popularity=[3] * COLUMNS), "24 routed tokens were seen in 0.1 s"),
        (FakeCluster(columns=COLUMNS, popularity=[LEAST_PER_COLUMN - 1] * COLUMNS), "too few"),
    ],
    ids=["not counted", "idle", "nearly"],
)
def test_what_cannot_be_known_is_said(cluster: FakeCluster, says: str) -> None:
    with serving(cluster) as client:
        answer = client.post("/elastic_ep/rebalance", json={"observe_s": 0.1})
        assert answer.status_code == 409 and says in answer.json()["error"], answer.text
        assert "topology_generation" in answer.json()


def test_a_change_meanwhile_is_noticed() -> None:
    cluster = FakeCluster(columns=COLUMNS, popularity=SKEWED)
    count = cluster.count_routed

    async def count_then_change(ranks: Any) -> list[int]:
        counts = await count(ranks)
        operation = await cluster.driven.submit(ScaleTo(size=3))
        await cluster.driven.wait(operation.operation_id)
        return counts

    cluster.count_routed = count_then_change  # type: ignore[method-assign]
    with serving(cluster) as client:
        answer = client.post("/elastic_ep/rebalance", json={"observe_s": 0.1})
        assert answer.status_code == 409 and "changed while the routing was observed" in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"observe_s": 0}, "observe_s must be seconds from 0.1 to 600, not 0"),
        ({"observe_s": "long"}, "observe_s must be seconds"),
        ({"least_gain": -1}, "least_gain must be a share"),
        ({"dry_run": 1}, "dry_run must be true or false"),
        ({"operation_id": "not a name"}, "operation_id is not a valid name"),
        ({"size": 3}, "unknown field"),
        ([], "must be a JSON object"),
    ],
)
def test_wrong_requests_are_refused(body: Any, says: str) -> None:
    with serving(FakeCluster(columns=COLUMNS, popularity=SKEWED)) as client:
        answer = client.post("/elastic_ep/rebalance", content=json.dumps(body))
        assert answer.status_code == 400 and says in answer.json()["error"], answer.text


def test_an_empty_body_is_the_default() -> None:
    assert parse_rebalance_request(b"").observe_s == 10.0
    with pytest.raises(UserInputError, match="not JSON"):
        parse_rebalance_request(b"{")
