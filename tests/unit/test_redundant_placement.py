"""Columns with copies: where copies go, who takes over from a rank that goes, and that every row is computed once."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.api.types import RebalanceAnswer
from elasticmoe_sglang.comm.control_page import CONTROL_BYTES, MAX_COPIES, ControlPage, SharedMemory
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.coordinator.routing import LEAST_PER_COLUMN
from elasticmoe_sglang.coordinator.status import Phase
from elasticmoe_sglang.errors import PlanError, UserInputError
from elasticmoe_sglang.planner import (
    TURNS,
    Cause,
    Placement,
    ScaleTo,
    View,
    imbalance,
    initial_placement,
    plan_loss,
    plan_target,
    rank_loads,
)
from elasticmoe_sglang.planner.placement import turns_of
from elasticmoe_sglang.planner.rebalance import balanced
from tests.helpers.fake_api import serving
from tests.helpers.fake_cluster import FakeCluster


def view_of(placement: Placement, ranks: tuple[int, ...], capacity: int = 8) -> View:
    return View(membership=Membership(ranks=ranks, epoch=3, capacity=capacity), placement=placement)


@st.composite
def placed(draw: st.DrawFn) -> tuple[Placement, tuple[int, ...], list[float], int]:
    """Any placement with copies over some ranks, loads, and how many copies there may be."""
    ranks = tuple(sorted(draw(st.sets(st.integers(1, 7), max_size=4)) | {0}))
    columns = draw(st.integers(len(ranks), 20))
    owners = list(initial_placement(columns, ranks).owners)
    draw(st.randoms(use_true_random=False)).shuffle(owners)
    places = [(c, rank) for c in range(columns) for rank in ranks if owners[c] != rank]
    copies = draw(st.lists(st.sampled_from(places), unique=True, max_size=8)) if places else []
    load = draw(st.lists(st.floats(0, 1e6), min_size=columns, max_size=columns))
    return Placement(owners=tuple(owners), copies=tuple(sorted(copies))), ranks, load, draw(st.integers(0, 12))


Case = tuple[Placement, tuple[int, ...], list[float], int]


@given(placed())
def test_every_turn_of_a_column_is_one_holders(case: Case) -> None:
    placement, ranks, _, _ = case
    computed: Counter[tuple[int, int]] = Counter()
    for rank in ranks:
        shared = placement.shared_by(rank)
        for column in placement.columns_of(rank):
            computed.update((column, turn) for turn in turns_of(column, *shared.get(column, (0, 1))))
    assert computed == Counter((column, turn) for column in range(placement.num_columns) for turn in range(TURNS))


@pytest.mark.parametrize("holders", range(1, 65))
def test_holders_have_equal_shares_of_the_turns(holders: int) -> None:
    for column in (0, 1, 7):
        shares = [len(turns_of(column, place, holders)) for place in range(holders)]
        assert max(shares) - min(shares) <= (TURNS % holders > 0) and sum(shares) == TURNS


@given(placed())
def test_copies_stay_within_their_number_and_numbers_of_owned_columns_stay(case: Case) -> None:
    placement, ranks, load, redundant = case
    after = balanced(placement, ranks, load, redundant=redundant)
    assert after.counts() == placement.counts()
    assert len(after.copies) <= redundant
    most = -(-redundant // len(ranks))
    assert all(count <= most for count in Counter(rank for _, rank in after.copies).values()), "an equal share each"
    without = balanced(Placement(owners=placement.owners), ranks, load)
    mean = sum(load) / len(ranks) or 1.0
    assert imbalance(after, ranks, load) <= imbalance(placement, ranks, load) + 0.02 or placement.copies
    assert balanced(placement, ranks, load, redundant=redundant) == after, "the same arguments, the same placement"
    assert sum(rank_loads(after, ranks, load).values()) == pytest.approx(sum(load), abs=1e-6 * mean)
    if not redundant:
        assert not after.copies and (placement.copies or after == without)


@given(placed())
def test_a_placement_with_copies_stays_while_its_load_does(case: Case) -> None:
    placement, ranks, load, redundant = case
    once = balanced(placement, ranks, load, redundant=redundant)
    assert balanced(once, ranks, load, redundant=redundant) == once


@pytest.mark.parametrize(("columns", "size"), [(64, 4), (128, 8), (256, 8), (256, 32), (32, 32)])
def test_popularity_of_one_over_rank_is_divided_evenly(columns: int, size: int) -> None:
    ranks, load = tuple(range(size)), [1 / (1 + column) for column in range(columns)]
    start = initial_placement(columns, ranks)
    moved = balanced(start, ranks, load)
    copied = balanced(start, ranks, load, redundant=size)
    assert imbalance(moved, ranks, load) > 1.05
    # With one column and one copy a rank the copies themselves are too large to even out.
    limit = 1.03 if columns > size else 1.2
    assert imbalance(copied, ranks, load) < min(limit, imbalance(moved, ranks, load))


def test_equal_loads_need_no_copies() -> None:
    ranks = tuple(range(8))
    assert not balanced(initial_placement(128, ranks), ranks, [5.0] * 128, redundant=16).copies


def test_copies_that_are_there_are_not_moved_without_need() -> None:
    ranks = (0, 1, 2)
    load = [60.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    first = balanced(initial_placement(6, ranks), ranks, load, redundant=3)
    assert {column for column, _ in first.copies} == {0}
    shifted = [66.0, *load[1:]]
    assert set(balanced(first, ranks, shifted, redundant=3).copies) == set(first.copies)
    other = balanced(first, ranks, [1.0, 60.0, 1.0, 1.0, 1.0, 1.0], redundant=3)
    assert other.holders(1) == ranks, "the copies of a column that has become cold make room"


# -- changes of the membership ---------------------------------------------------------------------------------------


@given(placed(), st.integers(1, 8))
def test_a_change_of_the_size_keeps_copies_of_ranks_that_stay(case: Case, size: int) -> None:
    placement, ranks, _, _ = case
    made = plan_target(view_of(placement, ranks), ScaleTo(size=size))
    after = made.after.placement
    assert after.is_balanced_over(made.after.ranks)
    held, before = set(after.held()), set(placement.held())
    assert {(move.column, move.target) for move in made.moves} == held - before, "what is not held yet, and no more"
    assert all(rank in made.after.ranks for _, rank in after.copies)
    assert set(after.copies) <= set(placement.copies), "a change of the size makes no copies"
    gone = {copy for copy in placement.copies if copy[1] in made.after.ranks} - set(after.copies)
    assert all(after.owners[column] == rank for column, rank in gone), "a copy that is none now is the column"
    for rank in made.before.ranks:
        assert set(made.departing(rank)) == {c for c, r in before - held if r == rank}


@given(placed(), st.data())
def test_after_a_loss_nothing_is_copied_that_a_survivor_holds(case: Case, data: st.DataObject) -> None:
    placement, ranks, _, _ = case
    lost = data.draw(st.sets(st.sampled_from(ranks), min_size=1)) if len(ranks) > 1 else {0}
    made = plan_loss(view_of(placement, ranks), lost)
    assert made.cause is Cause.LOSS
    for column, owner in enumerate(made.after.owners):
        holders = set(placement.holders(column)) & set(made.after.ranks)
        moved = [move for move in made.moves if move.column == column]
        if holders:
            assert owner in holders and not moved
        else:
            assert [(move.source, move.target) for move in moved] == [(placement.owners[column], owner)]


def test_the_survivor_that_owns_least_inherits() -> None:
    placement = Placement(owners=(0, 0, 1, 2, 2), copies=((3, 0), (3, 1), (4, 0)))
    made = plan_loss(view_of(placement, (0, 1, 2)), {2})
    assert made.after.owners == (0, 0, 1, 1, 0) and made.after.placement.copies == ((3, 0),) and not made.moves


def test_a_view_whose_copies_are_elsewhere_is_refused() -> None:
    with pytest.raises(PlanError, match=r"ranks \[2\] hold expert columns and are not active"):
        view_of(Placement(owners=(0, 1), copies=((0, 2),)), (0, 1))


@pytest.mark.parametrize(
    ("copies", "says"),
    [
        (((1, 0), (0, 1)), "not ascending"),
        (((0, 1), (0, 1)), "not ascending"),
        (((2, 1),), "expert column 2, which does not exist"),
        (((0, 0),), "rank 0 owns expert column 0 and has a copy of it"),
    ],
)
def test_copies_that_cannot_be_are_refused(copies: tuple[tuple[int, int], ...], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Placement(owners=(0, 1), copies=copies)


# -- the control page ------------------------------------------------------------------------------------------------


@pytest.fixture
def page() -> ControlPage:
    fd = os.memfd_create("page")
    os.ftruncate(fd, CONTROL_BYTES + mmap.PAGESIZE)
    shared = SharedMemory(fd)
    os.close(fd)
    ControlPage.format(shared, capacity=64, channels=1, window_bytes=4096)
    return ControlPage(shared)


def test_copies_are_published_with_their_view(page: ControlPage) -> None:
    copies = tuple((column, 63) for column in range(1, 4096, 2))
    owners = tuple(column % 2 for column in range(4096))
    for epoch, placement in enumerate(
        [Placement(owners=owners), Placement(owners=owners, copies=copies[:MAX_COPIES]), Placement(owners=(0, 1))]
    ):
        view = View(membership=Membership(ranks=(0, 1, 63), epoch=epoch, capacity=64), placement=placement)
        page.publish(view)
        assert page.read_view() == view


def test_more_copies_than_the_page_holds_are_refused(page: ControlPage) -> None:
    placement = Placement(owners=(0,) * 4096, copies=tuple((column, 1) for column in range(MAX_COPIES + 1)))
    with pytest.raises(UserInputError, match=f"{MAX_COPIES + 1} copies of expert columns are more than {MAX_COPIES}"):
        page.stage_placement(placement)


# -- the request -----------------------------------------------------------------------------------------------------

COLUMNS = 8
HOT = [40 * LEAST_PER_COLUMN if column == 0 else LEAST_PER_COLUMN for column in range(COLUMNS)]


def ask(client: Any, **body: Any) -> RebalanceAnswer:
    answer = client.post("/elastic_ep/rebalance", json={"observe_s": 0.1, "wait": True, **body})
    assert answer.status_code == 200, answer.text
    return msgspec.json.decode(answer.content, type=RebalanceAnswer)


def test_a_hot_column_is_copied_and_shown() -> None:
    cluster = FakeCluster(columns=COLUMNS, popularity=HOT, redundant=2)
    with serving(cluster) as client:
        assert client.get("/elastic_ep/status").json()["copies"] == {}
        done = ask(client)
        assert done.operation is not None and done.operation.phase is Phase.DONE, done
        assert (done.copies, done.expected_copies) == (0, done.operation.copies) and done.expected_copies > 0
        assert done.expected_imbalance < 1.05 < 1.5 < done.imbalance
        assert done.columns == done.operation.columns_moved == len(done.operation.moves)
        status = client.get("/elastic_ep/status").json()
        holders = {int(c): {status["placement"][int(c)], *ranks} for c, ranks in status["copies"].items()}
        assert all(set(cluster.committed.placement.holders(column)) == ranks for column, ranks in holders.items())
        assert holders[0] == {0, 1} and status["redundant_experts"] == 2
        again = ask(client)
        assert again.operation is None and again.note and again.imbalance == pytest.approx(done.expected_imbalance)
        routed = client.get("/elastic_ep/status").json()["routed"]
        assert sum(routed.values()) == sum(HOT) and max(routed.values()) < 0.53 * sum(HOT)


def test_copies_are_dropped_on_request_whatever_that_costs() -> None:
    cluster = FakeCluster(columns=COLUMNS, popularity=HOT, redundant=2)
    with serving(cluster) as client:
        ask(client)
        dropped = ask(client, copies=0)
        assert dropped.operation is not None and dropped.operation.phase is Phase.DONE
        assert dropped.expected_imbalance > dropped.imbalance and not cluster.committed.placement.copies
        assert cluster.held == {(owner, column) for column, owner in enumerate(cluster.committed.owners)}


@pytest.mark.parametrize(
    ("copies", "says"),
    [
        (3, "copies must be at most 2 on this server, not 3. It was started with so many --elasticmoe-redundant"),
        (-1, "copies must be a whole number of at least 0, not -1"),
        ("all", "copies must be a whole number"),
    ],
)
def test_numbers_of_copies_that_cannot_be_are_refused(copies: Any, says: str) -> None:
    with serving(FakeCluster(columns=COLUMNS, popularity=HOT, redundant=2)) as client:
        answer = client.post("/elastic_ep/rebalance", json={"copies": copies})
        assert answer.status_code == 400 and says in answer.json()["error"], answer.text


@pytest.mark.parametrize("call", ["pull 1", "pull 0", "ranks.commit", "hmm.commit", "release 0"])
@pytest.mark.parametrize("how", ["raise_before", "raise_after"])
def test_a_failed_step_leaves_what_the_placement_says(call: str, how: str) -> None:
    cluster = FakeCluster(columns=COLUMNS, popularity=HOT, redundant=2, faults={call: how})
    with serving(cluster) as client:
        ask(client, least_gain=0.0)
        cluster.faults = {}
        ask(client, least_gain=0.0)
        placed = {(holder, column) for column, holder in cluster.committed.placement.held()}
        assert cluster.mapped == placed == cluster.held and not cluster.open
        assert cluster.committed.placement.copies
