"""The simulation: the engine's clock, moves as the planner makes them, predictions that can be worked out by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scaling.costs import ASCEND_910C, H200, Costs, assumed
from benchmarks.scaling.events import Engine, Hold, Join, Resource, Steps, Wait
from benchmarks.scaling.simulation import (
    DecodeLoad,
    Weights,
    moves_between,
    placement_after,
    predict,
    predict_cold_restart,
    predict_throughput,
)
from benchmarks.scaling.validation import Check, Point, check, fit, largest_error, recorded_checks
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.planner import ScaleTo, View, initial_placement, plan_target

ZERO = assumed(0.0, "test")
BARE = replace(
    H200,
    message_s=ZERO, new_column_s=ZERO, old_column_s=ZERO, boot_s=ZERO, capture_s=ZERO, commit_s=ZERO,
    commit_rank_s=ZERO, near_copy=assumed(100.0, "bytes/s"), far_copy=assumed(10.0, "bytes/s"),
)  # fmt: skip
SMALL = Weights(columns=8, column_bytes=50, dense_bytes=200)


def test_a_resource_serves_in_turn_and_a_join_waits_for_all() -> None:
    engine, disk, ends = Engine(), Resource("disk"), []

    def reader(seconds: float) -> Steps:
        yield Wait(1.0)
        yield Hold(disk, seconds)
        ends.append(engine.now)

    def parent() -> Steps:
        yield Join([engine.start(reader(2.0)), engine.start(reader(3.0))])
        yield Join([])
        ends.append(engine.now)

    engine.start(parent())
    assert engine.run() == 6.0
    assert ends == [3.0, 6.0, 6.0] and disk.busy_s == 5.0


def test_two_at_a_time() -> None:
    engine, cores = Engine(), Resource("cores", 2)

    def boot() -> Steps:
        yield Hold(cores, 4.0)

    for _ in range(3):
        engine.start(boot())
    assert engine.run() == 8.0


@given(st.integers(1, 64), st.integers(1, 64), st.integers(64, 256))
def test_moves_are_as_few_as_the_planner_s(old: int, new: int, columns: int) -> None:
    ranks = tuple(range(old))
    membership = Membership(ranks=ranks, epoch=0, capacity=64)
    view = View(membership=membership, placement=initial_placement(columns, ranks))
    plan = plan_target(view, ScaleTo(size=new))
    assert len(moves_between(columns, old, new)) == len(plan.moves)
    assert placement_after(columns, old, new).is_balanced_over(range(new))


def test_one_joining_rank_by_hand() -> None:
    # 1 -> 2: dense 200 bytes and 4 columns of 50, all from device 0 at 100 bytes/s.
    found = predict(BARE, SMALL, 1, 2, capture=False)
    assert found.scale_latency_s == pytest.approx(4.0)
    assert (found.columns_moved, found.bytes_moved) == (4, 400)
    assert found.busiest_sender_s == pytest.approx(4.0)


def test_joining_ranks_wait_for_the_one_sender_of_dense_weights() -> None:
    # 2 -> 4: both read 200 bytes from device 0 (2 s and 4 s); two columns each, from devices 0 and 1.
    found = predict(BARE, SMALL, 2, 4, capture=False)
    assert 5.0 <= found.scale_latency_s <= 6.0


def test_another_node_is_reached_at_its_rate() -> None:
    costs = replace(BARE, per_node=1)
    assert predict(costs, SMALL, 1, 2, capture=False).scale_latency_s == pytest.approx(40.0)


def test_boot_cores_graphs_and_standbys() -> None:
    slow = replace(BARE, boot_s=assumed(3.0, ""), cores_per_node=assumed(2, ""), capture_s=assumed(7.0, ""))
    light = Weights(columns=8, column_bytes=1, dense_bytes=1)
    three = predict(slow, light, 1, 4, capture=False).scale_latency_s
    assert 6.0 <= three <= 6.1
    assert predict(slow, light, 1, 4).scale_latency_s == pytest.approx(three + 7.0)
    assert predict(slow, light, 1, 2, capture=False, standby=False).scale_latency_s > 45.0


def test_scaling_down_boots_nobody() -> None:
    found = predict(replace(BARE, boot_s=assumed(99.0, "")), SMALL, 2, 1)
    assert found.scale_latency_s == pytest.approx(2.0)
    assert "boot" not in found.phases


@pytest.mark.parametrize("costs", [H200, ASCEND_910C], ids=lambda costs: costs.name)
def test_every_assumption_is_labelled(costs: Costs) -> None:
    assert all(cost.origin and cost.value >= 0 for _, cost in costs.numbers())


def test_one_sender_of_dense_weights_becomes_the_bottleneck_of_large_changes() -> None:
    weights = Weights(columns=256, column_bytes=2_500 << 20, dense_bytes=32 << 30)
    found = predict(H200, weights, 128, 256, capture=False)
    # 120 joining ranks on other nodes than rank 0, 32 GiB each, through its one port at 45 GB/s.
    assert found.busiest_sender_s == pytest.approx(128 * (32 << 30) / 45e9, rel=0.05)
    assert found.scale_latency_s > found.busiest_sender_s
    assert predict_cold_restart(H200, weights, 16) > predict(H200, weights, 8, 16).scale_latency_s


def test_throughput_needs_room_and_grows_with_devices() -> None:
    weights = Weights(columns=256, column_bytes=2_500 << 20, dense_bytes=32 << 30)
    load = DecodeLoad(kv_bytes=70_000, context=4096, exchange_bytes=2 * 8 * 7168 * 2, layers=58)
    assert predict_throughput(ASCEND_910C, weights, 8, load) is None
    rates = [predict_throughput(H200, weights, size, load) for size in (16, 32, 64)]
    assert all(
        earlier is not None and later is not None and earlier < later for earlier, later in itertools.pairwise(rates)
    )


def test_the_check_fits_its_own_points_and_sees_a_wrong_one() -> None:
    def point(old: int, new: int, prepare: float, latency: float) -> Point:
        return Point(old_size=old, new_size=new, prepare_s=prepare, latency_s=latency, bytes_moved=0)

    # Four columns take 20 ms, and a joining rank's two or so with its dense weights as long as the first one's five.
    points = [point(1, 2, 1.0, 1.1), point(2, 1, 0.02, 0.12), point(2, 3, 1.0, 1.1), point(2, 3, 2.0, 2.2)]
    light = Weights(columns=8, column_bytes=1, dense_bytes=1)
    up, _, right, wrong = check(points, light, fit(points, light, copy_rate=1e9))
    assert up.fitted and up.error == pytest.approx(0.0, abs=0.01)
    assert not right.fitted and right.error == pytest.approx(0.0, abs=0.02)
    assert wrong.error == pytest.approx(-0.5, abs=0.02)


def test_what_was_recorded_on_gpus_is_among_the_checks() -> None:
    checks = recorded_checks(H200)
    kinds = {(c.point.old_size, c.point.new_size) for c in checks}
    assert kinds == {(1, 2), (2, 4), (4, 2), (2, 1)} and all("H200" in c.where for c in checks)
    # A boot is what changes up took, less the capture.
    assert all(abs(c.error) < 0.1 for c in checks if c.fitted)
    assert 1.0 <= largest_error(checks, up=False) < 3


def test_the_largest_error_counts_both_ways() -> None:
    def one(predicted: float, *, up: bool, fitted: bool = False) -> Check:
        sizes = (1, 2) if up else (2, 1)
        made = Point(old_size=sizes[0], new_size=sizes[1], prepare_s=0.0, latency_s=1.0, bytes_moved=0)
        return Check(point=made, predicted_s=predicted, fitted=fitted)

    checks = [one(0.4, up=True), one(2.0, up=True), one(9.0, up=True, fitted=True), one(1.5, up=False)]
    assert (largest_error(checks, up=True), largest_error(checks, up=False)) == (2.5, 1.5)
