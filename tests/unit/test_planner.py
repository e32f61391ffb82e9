"""The planner against brute force and against a minimum-cost flow, for any old and new membership."""

from __future__ import annotations

from itertools import product

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import PlanError
from elasticmoe_sglang.planner import (
    Placement,
    RestoreRanks,
    RetireRanks,
    ScalePlan,
    ScaleTo,
    Target,
    initial_placement,
    plan_scale,
)


def members(*ranks: int, capacity: int = 4, epoch: int = 7) -> Membership:
    return Membership(ranks=tuple(ranks), epoch=epoch, capacity=capacity)


@st.composite
def memberships(draw: st.DrawFn, max_capacity: int = 12) -> Membership:
    capacity = draw(st.integers(1, max_capacity))
    others = draw(st.sets(st.integers(1, capacity - 1))) if capacity > 1 else set()
    return Membership(ranks=(0, *sorted(others)), epoch=draw(st.integers(0, 1 << 40)), capacity=capacity)


@st.composite
def questions(draw: st.DrawFn, max_capacity: int = 12, max_columns: int = 40) -> tuple[Membership, Placement, Target]:
    """A membership, any placement of columns over its ranks (balanced or not) and a legal target."""
    membership = draw(memberships(max_capacity))
    owners = st.lists(st.sampled_from(membership.ranks), min_size=1, max_size=max_columns)
    placement = Placement(owners=tuple(draw(owners)))
    sizes: st.SearchStrategy[Target] = st.builds(ScaleTo, size=st.integers(1, membership.capacity))
    if len(membership.ranks) == 1:
        return membership, placement, draw(sizes)
    retirable = st.sets(st.sampled_from(membership.ranks[1:]), min_size=1)
    retire: st.SearchStrategy[Target] = retirable.map(lambda ranks: RetireRanks(ranks=tuple(ranks)))
    inactive = [rank for rank in range(membership.capacity) if rank not in membership.ranks]
    if not inactive:
        return membership, placement, draw(sizes | retire)
    restorable = st.lists(st.sampled_from(inactive), min_size=1, unique=True)
    restore: st.SearchStrategy[Target] = restorable.map(lambda ranks: RestoreRanks(ranks=tuple(ranks)))
    return membership, placement, draw(sizes | retire | restore)


def fewest_moves_by_flow(placement: Placement, ranks: tuple[int, ...]) -> int:
    """Minimum-cost flow: each column to one rank, each rank n // k columns and at most one odd one, staying is free."""
    share, odd = divmod(placement.num_columns, len(ranks))
    graph = networkx.DiGraph()
    graph.add_node("odd", demand=odd)
    for rank in ranks:
        graph.add_node(("rank", rank), demand=share)
        graph.add_edge(("rank", rank), "odd", capacity=1, weight=0)
    for column, owner in enumerate(placement.owners):
        graph.add_node(("column", column), demand=-1)
        for rank in ranks:
            graph.add_edge(("column", column), ("rank", rank), capacity=1, weight=int(owner != rank))
    return int(networkx.min_cost_flow_cost(graph))


def fewest_moves_by_trying(placement: Placement, ranks: tuple[int, ...]) -> int:
    def balanced(owners: tuple[int, ...]) -> bool:
        counts = [owners.count(rank) for rank in ranks]
        return max(counts) - min(counts) <= 1

    return min(
        sum(a != b for a, b in zip(owners, placement.owners, strict=True))
        for owners in product(ranks, repeat=placement.num_columns)
        if balanced(owners)
    )


def check(plan: ScalePlan) -> None:
    """What holds for every plan, whatever was wished."""
    assert plan.placement_after.is_balanced_over(plan.after.ranks)
    assert plan.after.ranks == tuple(sorted(set(plan.after.ranks))) and plan.after.ranks[0] == 0
    assert set(plan.joining) == set(plan.after.ranks) - set(plan.before.ranks)
    assert set(plan.retiring) == set(plan.before.ranks) - set(plan.after.ranks)
    assert set(plan.survivors) == set(plan.before.ranks) & set(plan.after.ranks)
    moved = {move.column: move for move in plan.moves}
    assert len(moved) == len(plan.moves)
    for column, (old, new) in enumerate(zip(plan.placement_before.owners, plan.placement_after.owners, strict=True)):
        assert (old != new) == (column in moved)
        if old != new:
            assert (moved[column].source, moved[column].target) == (old, new)
    assert plan.is_noop == (plan.before == plan.after)
    assert plan.after.epoch == plan.before.epoch + (not plan.is_noop)
    assert plan.after.capacity == plan.before.capacity


@given(questions())
@settings(max_examples=300, deadline=None)
def test_plan_is_balanced_deterministic_and_moves_as_few_columns_as_a_flow(
    question: tuple[Membership, Placement, Target],
) -> None:
    plan = plan_scale(*question)
    check(plan)
    assert plan == plan_scale(*question)
    assert len(plan.moves) == fewest_moves_by_flow(plan.placement_before, plan.after.ranks)


@given(questions(max_capacity=4, max_columns=6))
@settings(max_examples=60, deadline=None)
def test_moves_equal_the_best_of_all_placements(question: tuple[Membership, Placement, Target]) -> None:
    plan = plan_scale(*question)
    assert len(plan.moves) == fewest_moves_by_trying(plan.placement_before, plan.after.ranks)


@given(memberships(), st.integers(1, 200), st.data())
@settings(max_examples=100, deadline=None)
def test_a_chain_of_changes_stays_balanced(membership: Membership, num_columns: int, data: st.DataObject) -> None:
    placement = initial_placement(num_columns, membership.ranks)
    for _ in range(6):
        size = data.draw(st.integers(1, membership.capacity))
        plan = plan_scale(membership, placement, ScaleTo(size=size))
        check(plan)
        assert len(plan.after.ranks) == size
        membership, placement = plan.after, plan.placement_after


@given(memberships(), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_initial_placement_is_balanced_and_contiguous(membership: Membership, num_columns: int) -> None:
    placement = initial_placement(num_columns, membership.ranks)
    assert placement.num_columns == num_columns
    assert placement.is_balanced_over(membership.ranks)
    assert list(placement.owners) == sorted(placement.owners)


def test_uneven_split_of_128_columns_over_3_ranks() -> None:
    assert initial_placement(128, (0, 1, 2)).counts() == {0: 43, 1: 43, 2: 42}


def test_growth_takes_the_lowest_empty_ranks() -> None:
    plan = plan_scale(members(0, 2, capacity=5), initial_placement(8, (0, 2)), ScaleTo(size=4))
    assert plan.joining == (1, 3)
    assert len(plan.moves) == 4


def test_shrinking_by_size_retires_the_highest_ranks() -> None:
    plan = plan_scale(members(0, 1, 3), initial_placement(9, (0, 1, 3)), ScaleTo(size=1))
    assert plan.retiring == (1, 3) and plan.after.ranks == (0,)
    assert {move.source for move in plan.moves} == {1, 3}


def test_retiring_an_inner_rank_moves_its_columns_alone() -> None:
    placement = initial_placement(12, (0, 1, 2, 3))
    plan = plan_scale(members(0, 1, 2, 3), placement, RetireRanks(ranks=(2,)))
    assert plan.after.ranks == (0, 1, 3)
    assert tuple(move.column for move in plan.moves) == placement.columns_of(2)


def test_a_receiver_pulls_from_all_sources() -> None:
    plan = plan_scale(members(0, 1, 2), initial_placement(12, (0, 1, 2)), ScaleTo(size=4))
    assert sorted(move.source for move in plan.incoming(3)) == [0, 1, 2]


def test_the_same_size_is_a_noop_and_keeps_the_epoch() -> None:
    plan = plan_scale(members(0, 1), initial_placement(8, (0, 1)), ScaleTo(size=2))
    assert plan.is_noop and plan.after == plan.before and plan.placement_after == plan.placement_before


def test_the_same_size_mends_an_unbalanced_placement() -> None:
    plan = plan_scale(members(0, 1), Placement(owners=(0, 0, 0, 1)), ScaleTo(size=2))
    assert not plan.is_noop and len(plan.moves) == 1 and plan.after.epoch == 8


def test_columns_of_a_rank_that_is_gone_are_placed_again() -> None:
    plan = plan_scale(members(0, 1), Placement(owners=(0, 1, 3, 3)), ScaleTo(size=2))
    assert [(move.source, move.target) for move in plan.moves] == [(3, 0), (3, 1)]


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (ScaleTo(size=0), "from 1 to 4"),
        (ScaleTo(size=-1), "from 1 to 4"),
        (ScaleTo(size=5), "It has 4 ranks"),
        (RetireRanks(ranks=()), "Ranks that can be retired now: 1, 2"),
        (RetireRanks(ranks=(0,)), "rank 0 cannot be retired"),
        (RetireRanks(ranks=(0, 1)), "rank 0 cannot be retired"),
        (RetireRanks(ranks=(3,)), "rank 3 is not active"),
        (RetireRanks(ranks=(-1, 9)), "ranks -1, 9 are not active"),
        (RetireRanks(ranks=(1, 1)), "is repeated"),
        (RestoreRanks(ranks=()), "restore_ranks is empty"),
        (RestoreRanks(ranks=(1,)), "rank 1 is not inactive"),
        (RestoreRanks(ranks=(3, 3)), "is repeated"),
        (RestoreRanks(ranks=(-1, 9)), "ranks -1, 9 are not inactive"),
    ],
)
def test_an_impossible_target_says_what_is_allowed(target: Target, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        plan_scale(members(0, 1, 2), initial_placement(6, (0, 1, 2)), target)


def test_nothing_can_be_retired_from_a_single_rank() -> None:
    with pytest.raises(PlanError, match="Only rank 0 is active"):
        plan_scale(members(0), initial_placement(6, (0,)), RetireRanks(ranks=(1,)))


@pytest.mark.parametrize(("columns", "ranks"), [(0, (0,)), (4, ()), (4, (0, 0))])
def test_initial_placement_refuses_nonsense(columns: int, ranks: tuple[int, ...]) -> None:
    with pytest.raises(PlanError):
        initial_placement(columns, ranks)
