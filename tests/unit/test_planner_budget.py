"""Budgets during a change, and sizes as text."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import BudgetExceeded, UserInputError
from elasticmoe_sglang.planner import (
    DeviceRoom,
    ModelNeeds,
    Rebalance,
    ScaleTo,
    check_budgets,
    extra_bytes,
    initial_placement,
)
from elasticmoe_sglang.planner.placement import View
from elasticmoe_sglang.planner.plan import TransitionPlan, plan_target
from elasticmoe_sglang.units import format_bytes, parse_bytes

MODEL = ModelNeeds(column_bytes=100, dense_bytes=1000, rank_bytes=10)


def scale(old: tuple[int, ...], size: int, columns: int = 8) -> TransitionPlan:
    membership = Membership(ranks=old, epoch=0, capacity=4)
    return plan_target(View(membership=membership, placement=initial_placement(columns, old)), ScaleTo(size=size))


def room(device: int, ranks: tuple[int, ...], *, free: int, dense: bool = True) -> DeviceRoom:
    return DeviceRoom(device=device, ranks=ranks, budget=5000, used=5000 - free, holds_dense=dense)


def test_a_joining_rank_needs_columns_dense_weights_and_its_own_bytes() -> None:
    assert extra_bytes(scale((0, 1), 4), MODEL, room(2, (2,), free=0, dense=False)) == 2 * 100 + 1000 + 10


def test_two_joining_ranks_on_one_device_share_the_dense_weights() -> None:
    assert extra_bytes(scale((0, 1), 4), MODEL, room(1, (2, 3), free=0, dense=False)) == 4 * 100 + 1000 + 2 * 10
    assert extra_bytes(scale((0, 1), 4), MODEL, room(1, (2, 3), free=0, dense=True)) == 4 * 100 + 2 * 10


def test_a_survivor_holds_old_and_incoming_columns_at_once() -> None:
    plan = scale((0, 1, 2, 3), 2)
    assert extra_bytes(plan, MODEL, room(0, (0,), free=0)) == 2 * 100
    assert extra_bytes(plan, MODEL, room(3, (3,), free=0)) == 0


def test_what_departs_is_not_counted_as_room() -> None:
    # Both ranks of the device change columns; the retiring rank's bytes come back only after the commit.
    plan = scale((0, 1), 1)
    with pytest.raises(BudgetExceeded):
        check_budgets(plan, MODEL, [room(0, (0, 1), free=399)])
    check_budgets(plan, MODEL, [room(0, (0, 1), free=400)])


def test_the_refusal_carries_its_numbers() -> None:
    devices = [room(0, (0,), free=0), room(1, (1,), free=0), room(2, (2,), free=1209, dense=False)]
    with pytest.raises(BudgetExceeded, match=r"device 2 needs 1\.18 KiB more and has 1\.18 KiB free of") as caught:
        check_budgets(scale((0, 1), 4), MODEL, devices)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.device, error.needed, error.free, error.budget) == (2, 1210, 1209, 5000)
    assert "larger --budget" in str(error)


def test_copies_that_do_not_fit_are_refused_with_what_to_do() -> None:
    view = View(membership=Membership(ranks=(0, 1), epoch=0, capacity=4), placement=initial_placement(4, (0, 1)))
    plan = plan_target(view, Rebalance(load=(90.0, 1.0, 1.0, 1.0), redundant=2))
    assert plan.after.placement.holders(0) == (0, 1)
    needed = 100 * len(plan.incoming(1))
    assert extra_bytes(plan, MODEL, room(1, (1,), free=0)) == needed > 0
    check_budgets(plan, MODEL, [room(0, (0,), free=500), room(1, (1,), free=needed)])
    says = rf"placing {len(plan.moves)} columns anew does not fit: device 1 needs .* Allow fewer copies .*--copies N"
    with pytest.raises(BudgetExceeded, match=says):
        check_budgets(plan, MODEL, [room(0, (0,), free=500), room(1, (1,), free=needed - 1)])


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("2GiB", 2 << 30), ("2g", 2 << 30), ("512MiB", 512 << 20), ("1.5 KiB", 1536), ("3kB", 3000), ("7b", 7)],
)
def test_parse_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "0.0001K", "1 QiB", "1e9", "2GiBs", "٣x", "1.2.3"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(UserInputError):
        parse_bytes(text)


@given(st.integers(1, 1 << 45))
def test_parse_bytes_reads_plain_numbers_exactly(size: int) -> None:
    assert parse_bytes(str(size)) == size


@given(st.integers(1, 1 << 48))
def test_format_bytes_is_right_to_three_digits(size: int) -> None:
    assert abs(parse_bytes(format_bytes(size)) - size) <= size * 0.006 + 1


def test_format_bytes() -> None:
    assert [format_bytes(size) for size in (0, 1023, 1024, 1536, 1010 * 1024, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "1010 KiB",
        "3 TiB",
    ]
