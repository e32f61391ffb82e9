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
    ScaleTo,
    Target,
    TransitionPlan,
    View,
    initial_placement,
    plan_loss,
    plan_restore,
    plan_target,
)


def members(*ranks: int, capacity: int = 4, epoch: int = 7) -> Membership:
    return Membership(ranks=tuple(ranks), epoch=epoch, capacity=capacity)


def plan(membership: Membership, placement: Placement, target: Target) -> TransitionPlan:
    return plan_target(View(membership=membership, placement=placement), target)


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


def check(plan: TransitionPlan) -> None:
    """What holds for every plan, whatever was wished."""
    assert plan.after.placement.is_balanced_over(plan.after.ranks)
    assert plan.after.ranks == tuple(sorted(set(plan.after.ranks))) and plan.after.ranks[0] == 0
    assert set(plan.joining) == set(plan.after.ranks) - set(plan.before.ranks)
    assert set(plan.retiring) == set(plan.before.ranks) - set(plan.after.ranks)
    assert set(plan.survivors) == set(plan.before.ranks) & set(plan.after.ranks)
    moved = {move.column: move for move in plan.moves}
    assert len(moved) == len(plan.moves)
    for column, (old, new) in enumerate(zip(plan.before.placement.owners, plan.after.placement.owners, strict=True)):
        assert (old != new) == (column in moved)
        if old != new:
            assert (moved[column].source, moved[column].target) == (old, new)
    assert plan.is_noop == (plan.before == plan.after)
    assert plan.after.epoch == plan.before.epoch + (not plan.is_noop)
    assert plan.after.membership.capacity == plan.before.membership.capacity


@pytest.mark.process
@given(questions())
@settings(max_examples=300, deadline=None)
def test_plan_is_balanced_deterministic_and_moves_as_few_columns_as_a_flow(
    question: tuple[Membership, Placement, Target],
) -> None:
    made = plan(*question)
    check(made)
    assert made == plan(*question)
    assert len(made.moves) == fewest_moves_by_flow(made.before.placement, made.after.ranks)


@given(questions(max_capacity=4, max_columns=6))
@settings(max_examples=60, deadline=None)
def test_moves_equal_the_best_of_all_placements(question: tuple[Membership, Placement, Target]) -> None:
    made = plan(*question)
    assert len(made.moves) == fewest_moves_by_trying(made.before.placement, made.after.ranks)


@given(memberships(), st.integers(1, 200), st.data())
@settings(max_examples=100, deadline=None)
def test_a_chain_of_changes_stays_balanced(membership: Membership, num_columns: int, data: st.DataObject) -> None:
    placement = initial_placement(num_columns, membership.ranks)
    for _ in range(6):
        size = data.draw(st.integers(1, membership.capacity))
        made = plan(membership, placement, ScaleTo(size=size))
        check(made)
        assert len(made.after.ranks) == size
        membership, placement = made.after.membership, made.after.placement


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
    made = plan(members(0, 2, capacity=5), initial_placement(8, (0, 2)), ScaleTo(size=4))
    assert made.joining == (1, 3)
    assert len(made.moves) == 4


def test_shrinking_by_size_retires_the_highest_ranks() -> None:
    made = plan(members(0, 1, 3), initial_placement(9, (0, 1, 3)), ScaleTo(size=1))
    assert made.retiring == (1, 3) and made.after.ranks == (0,)
    assert {move.source for move in made.moves} == {1, 3}


def test_retiring_an_inner_rank_moves_its_columns_alone() -> None:
    placement = initial_placement(12, (0, 1, 2, 3))
    made = plan(members(0, 1, 2, 3), placement, RetireRanks(ranks=(2,)))
    assert made.after.ranks == (0, 1, 3)
    assert tuple(move.column for move in made.moves) == placement.columns_of(2)


def test_a_receiver_pulls_from_all_sources() -> None:
    made = plan(members(0, 1, 2), initial_placement(12, (0, 1, 2)), ScaleTo(size=4))
    assert sorted(move.source for move in made.incoming(3)) == [0, 1, 2]


def test_the_same_size_is_a_noop_and_keeps_the_epoch() -> None:
    made = plan(members(0, 1), initial_placement(8, (0, 1)), ScaleTo(size=2))
    assert made.is_noop and made.after == made.before


def test_the_same_size_mends_an_unbalanced_placement() -> None:
    made = plan(members(0, 1), Placement(owners=(0, 0, 0, 1)), ScaleTo(size=2))
    assert not made.is_noop and len(made.moves) == 1 and made.after.epoch == 8


def test_no_view_has_columns_on_a_rank_that_is_not_active() -> None:
    with pytest.raises(PlanError, match=r"ranks \[3\] hold expert columns and are not active"):
        View(membership=members(0, 1), placement=Placement(owners=(0, 1, 3, 3)))


@pytest.mark.process
@given(questions(), st.data())
@settings(max_examples=150, deadline=None)
def test_after_a_loss_survivors_keep_what_they_have(
    question: tuple[Membership, Placement, Target], data: st.DataObject
) -> None:
    view = View(membership=question[0], placement=question[1])
    lost = data.draw(st.sets(st.sampled_from(view.ranks)))
    replace_all = data.draw(st.booleans())
    made = plan_loss(view, lost, replace_all=replace_all)
    assert made.after.epoch == view.epoch + 1 and not made.is_noop and made.lost == tuple(sorted(lost))
    assert set(made.after.ranks) == set(view.ranks) - (set() if replace_all else lost - {0})
    assert set(made.joining) == lost & set(made.after.ranks) and made.retiring == ()
    assert set(made.survivors) == set(view.ranks) - lost
    assert set(made.participants) == set(made.after.ranks)
    if set(made.after.ranks) == set(view.ranks):
        assert made.moves == (), "nothing moves while streams wait"


def test_living_ranks_meet_again_in_the_next_epoch_without_a_move() -> None:
    view = View(membership=members(0, 2), placement=Placement(owners=(0, 0, 0, 2)))
    made = plan_loss(view, ())
    assert (made.after.epoch, made.after.owners, made.survivors, made.joining) == (8, view.owners, (0, 2), ())


def test_a_restore_brings_back_the_ranks_of_the_last_target() -> None:
    view = View(membership=members(0, 3), placement=initial_placement(8, (0, 3)))
    made = plan_restore(view, (2,))
    assert made.after.ranks == (0, 2, 3) and made.joining == (2,) and made.after.placement.is_balanced_over((0, 2, 3))


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
        plan(members(0, 1, 2), initial_placement(6, (0, 1, 2)), target)


def test_nothing_can_be_retired_from_a_single_rank() -> None:
    with pytest.raises(PlanError, match="Only rank 0 is active"):
        plan(members(0), initial_placement(6, (0,)), RetireRanks(ranks=(1,)))


@pytest.mark.parametrize(("columns", "ranks"), [(0, (0,)), (4, ()), (4, (0, 0))])
def test_initial_placement_refuses_nonsense(columns: int, ranks: tuple[int, ...]) -> None:
    with pytest.raises(PlanError):
        initial_placement(columns, ranks)
