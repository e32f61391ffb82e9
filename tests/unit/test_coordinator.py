"""The coordinator as a transaction: every step fails in every way, and everything begun is undone exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe_sglang.coordinator.coordinator import HISTORY, Coordinator
from elasticmoe_sglang.coordinator.observer import Observer, Recovery
from elasticmoe_sglang.coordinator.status import Operation, Phase, RankState
from elasticmoe_sglang.errors import (
    BudgetExceeded,
    HmmUnavailable,
    OperationIdTaken,
    OperationInProgress,
    PlanError,
    UserInputError,
)
from elasticmoe_sglang.planner import Cause, RetireRanks, ScaleTo, Target
from tests.helpers import clock
from tests.helpers.fake_cluster import COLUMN, DENSE, KV_CHUNKS, FakeCluster

pytestmark = pytest.mark.process

SHORT = {"prepare_deadline_s": 1.0, "commit_deadline_s": 0.5, "finish_deadline_s": 1.0}
"""Deadlines for calls that hang: long enough for a machine that stands still for a moment, and waited for only then."""
HOW = ["raise_before", "raise_after", "hang"]
UP = ScaleTo(size=4)
DOWN = RetireRanks(ranks=(1,))


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elasticmoe_sglang.coordinator.engine.COMMIT_ANSWER_S", 0.05)


def run(main: Coroutine[Any, Any, None]) -> None:
    clock.run(asyncio.wait_for(main, 20))


async def change(coordinator: Coordinator, target: Target) -> Operation:
    operation = await coordinator.submit(target)
    return await coordinator.wait(operation.operation_id)


def up_cluster(**more: Any) -> FakeCluster:
    return FakeCluster(active=(0, 1), **more)


def down_cluster(**more: Any) -> FakeCluster:
    return FakeCluster(active=(0, 1, 2, 3), columns=12, **more)


def test_scale_up_order_and_report() -> None:
    async def main() -> None:
        cluster = up_cluster()
        coordinator = cluster.coordinator()
        first = await coordinator.submit(UP)
        assert first.phase is Phase.PREPARING
        done = await coordinator.wait(first.operation_id)
        assert done.phase is Phase.DONE and done.error is None
        assert (done.old_ep_size, done.new_ep_size, done.joining, done.retiring) == (2, 4, [2, 3], [])
        assert (done.columns_planned, done.columns_moved, done.bytes_moved) == (4, 4, 4 * COLUMN)
        assert done.pause_ms == {0: 1.0, 1: 2.0} and done.max_pause_ms == 2.0
        assert done.epoch == coordinator.view.epoch == 1
        cluster.check_settled(coordinator)
        assert cluster.log[:2] == ["begin", "shrink_kv"]
        assert set(cluster.log[2:4]) == {"boot 2", "boot 3"}
        assert cluster.log[4:6] == ["ranks.commit", "hmm.commit"]
        assert set(cluster.log[6:8]) == {"release 0", "release 1"}
        assert cluster.log[8:] == ["grow_kv"], "KV grows into what departed columns left"

    run(main())


def test_scale_down_order_and_report() -> None:
    async def main() -> None:
        cluster = down_cluster()
        coordinator = cluster.coordinator()
        done = await change(coordinator, DOWN)
        assert done.phase is Phase.DONE and (done.moved_requests, done.recomputed_requests) == (3, 1)
        assert done.retiring == [1] and done.ranks_after == [0, 2, 3]
        cluster.check_settled(coordinator)
        assert cluster.log[:2] == ["begin", "shrink_kv"], "KV makes room before columns are allocated"
        assert set(cluster.log[2:5]) == {"pull 0", "pull 2", "pull 3"}
        assert cluster.log[5:] == ["ranks.commit", "hmm.commit", "dismiss 1", "release 1", "grow_kv"]

    run(main())


def test_phases_are_timed() -> None:
    async def main() -> None:
        done = await change(up_cluster().coordinator(), UP)
        times = done.timings
        parts = [times.planned_ms, times.preparing_ms, times.committing_ms, times.finishing_ms]
        assert all(part is not None and part >= 0 for part in parts)
        assert times.total_ms is not None
        assert times.total_ms == pytest.approx(sum(part for part in parts if part is not None), abs=0.01)

    run(main())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("call", ["begin", "shrink_kv", "boot 2", "boot 3", "ranks.commit"])
def test_a_failed_growth_is_undone_exactly_once(call: str, how: str) -> None:
    check_rolled_back(up_cluster(), UP, call, how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("call", ["begin", "shrink_kv", "pull 0", "pull 2", "pull 3", "ranks.commit"])
def test_a_failed_shrinking_is_undone_exactly_once(call: str, how: str) -> None:
    check_rolled_back(down_cluster(), DOWN, call, how)


def check_rolled_back(cluster: FakeCluster, target: Target, call: str, how: str) -> None:
    async def main() -> None:
        cluster.faults = {call: how}
        coordinator = cluster.coordinator(**SHORT)
        before = coordinator.view
        ended = await change(coordinator, target)
        if call == "ranks.commit" and how == "raise_after":
            # The answer was lost, but the control page says that it happened.
            assert ended.phase is Phase.DONE and ended.serving_epoch == ended.epoch == 1
            cluster.check_settled(coordinator)
            return
        assert ended.phase is Phase.ROLLED_BACK and (ended.epoch, ended.serving_epoch) == (1, 0)
        assert ended.error is not None and (call in ended.error or "took longer than" in ended.error)
        assert coordinator.view == before
        cluster.check_settled(coordinator)
        opened = call != "begin"
        assert cluster.calls["rollback"] == cluster.calls["grow_kv"] == opened
        assert cluster.calls["hmm.commit"] == 0
        for rank in range(cluster.capacity):
            assert cluster.calls[f"dismiss {rank}"] == cluster.calls[f"boot {rank}"] <= 1
            assert cluster.calls[f"drop {rank}"] == cluster.calls[f"pull {rank}"] <= 1
            assert cluster.calls[f"release {rank}"] == 0
        cluster.faults = {}
        assert (await change(coordinator, target)).phase is Phase.DONE
        cluster.check_settled(coordinator)

    run(main())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("call", ["hmm.commit", "release 0", "release 1", "grow_kv"])
def test_a_growth_that_fails_in_finish_is_loud_and_keeps_the_new_membership(call: str, how: str) -> None:
    check_failed_in_finish(up_cluster(), UP, call, how)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("call", ["hmm.commit", "dismiss 1", "release 1", "grow_kv"])
def test_a_shrinking_that_fails_in_finish_is_loud_and_keeps_the_new_membership(call: str, how: str) -> None:
    check_failed_in_finish(down_cluster(), DOWN, call, how)


def check_failed_in_finish(cluster: FakeCluster, target: Target, call: str, how: str) -> None:
    async def main() -> None:
        cluster.faults = {call: how}
        coordinator = cluster.coordinator(**SHORT)
        ended = await change(coordinator, target)
        assert ended.phase is Phase.FAILED
        assert ended.error is not None and "epoch 1 serves" in ended.error
        assert ended.serving_epoch == 1
        assert coordinator.view == cluster.committed and coordinator.view.epoch == 1
        assert cluster.calls["rollback"] == 0
        wanted = {"hmm.commit", *(f"dismiss {rank}" for rank in ended.retiring)}
        assert wanted <= set(cluster.calls)
        if call.startswith("dismiss"):
            assert "release 1" not in cluster.calls, "columns that a retiring rank may still map were freed"
        cluster.faults = {}
        while not coordinator.idle:
            await asyncio.sleep(0.01)
        assert not cluster.open and cluster.calls["hmm.commit"] >= 1, "what has failed is done later"

    run(main())


@pytest.mark.parametrize("undo", ["dismiss 2", "rollback", "grow_kv"])
def test_a_failing_undo_is_loud_and_does_not_stop_the_other_undos(undo: str) -> None:
    async def main() -> None:
        cluster = up_cluster(faults={"boot 3": "raise_after", undo: "raise_after"})
        coordinator = cluster.coordinator(**SHORT)
        ended = await change(coordinator, UP)
        assert ended.phase is Phase.FAILED
        assert ended.error is not None
        assert "boot 3" in ended.error and undo in ended.error and "epoch 0 still serves" in ended.error
        assert ended.serving_epoch == 0
        assert cluster.calls["dismiss 3"] == 1
        if undo == "dismiss 2":
            assert not cluster.calls["rollback"] or cluster.log.index("rollback") > cluster.log.index("dismiss 2")
        cluster.faults = {}
        while not coordinator.idle:
            await asyncio.sleep(0.01)
        assert cluster.calls["rollback"] >= 1, "what could not be undone is undone later"
        assert (await change(coordinator, UP)).phase is Phase.DONE
        cluster.check_settled(coordinator)

    run(main())


def test_an_aborted_commit_is_rolled_back_with_its_reason() -> None:
    async def main() -> None:
        cluster = up_cluster(commit_verdict="rank 3 did not reach the commit barrier")
        coordinator = cluster.coordinator()
        ended = await change(coordinator, UP)
        assert ended.phase is Phase.ROLLED_BACK and ended.error == "rank 3 did not reach the commit barrier"
        cluster.check_settled(coordinator)

    run(main())


def test_columns_that_did_not_arrive_are_an_error() -> None:
    async def main() -> None:
        cluster = up_cluster(faults={"boot 2": "short"})
        coordinator = cluster.coordinator()
        ended = await change(coordinator, UP)
        assert ended.phase is Phase.ROLLED_BACK and "only 1 of 2 columns were pulled (rank 2" in str(ended.error)
        cluster.check_settled(coordinator)

    run(main())


def test_one_operation_at_a_time() -> None:
    async def main() -> None:
        coordinator = up_cluster().coordinator()
        first = await coordinator.submit(UP)
        with pytest.raises(OperationInProgress, match=first.operation_id):
            await coordinator.submit(ScaleTo(size=1))
        assert coordinator.running is not None
        await coordinator.wait(first.operation_id)
        assert coordinator.running is None
        assert (await change(coordinator, ScaleTo(size=1))).phase is Phase.DONE

    run(main())


def test_a_repeated_id_is_the_same_operation_while_it_runs_and_after_it() -> None:
    async def main() -> None:
        cluster = up_cluster()
        coordinator = cluster.coordinator()
        first, second = await asyncio.gather(coordinator.submit(UP, "one"), coordinator.submit(UP, "one"))
        assert first.created_at == second.created_at
        await coordinator.wait("one")
        assert (await coordinator.submit(UP, "one")).phase is Phase.DONE
        assert cluster.calls["begin"] == 1
        with pytest.raises(OperationIdTaken, match="used for another target"):
            await coordinator.submit(DOWN, "one")

    run(main())


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "a/b", "a\n"])
def test_an_id_that_is_no_name_is_refused(bad: str) -> None:
    async def main() -> None:
        with pytest.raises(UserInputError, match="letters, digits"):
            await up_cluster().coordinator().submit(UP, bad)

    run(main())


def test_a_fulfilled_target_is_done_at_once_even_without_an_hmm() -> None:
    async def main() -> None:
        cluster = up_cluster(hmm_answers=False)
        operation = await cluster.coordinator().submit(ScaleTo(size=2))
        assert operation.phase is Phase.DONE and operation.message == "Nothing had to change."
        assert not cluster.calls and operation.epoch == 0

    run(main())


def test_history_is_bounded() -> None:
    async def main() -> None:
        coordinator = up_cluster().coordinator()
        for index in range(HISTORY + 10):
            await coordinator.submit(ScaleTo(size=2), f"op-{index}")
        assert len(coordinator.operations()) == HISTORY
        assert coordinator.get("op-9") is None and coordinator.get("op-10") is not None
        assert coordinator.operations()[0].operation_id == f"op-{HISTORY + 9}"

    run(main())


def test_refusals_before_anything_is_begun() -> None:
    async def main() -> None:
        cluster = up_cluster(budget=COLUMN * 4 + 6000)
        coordinator = cluster.coordinator()
        with pytest.raises(PlanError, match="from 1 to 4"):
            await coordinator.submit(ScaleTo(size=5))
        with pytest.raises(BudgetExceeded, match="device 0 needs"):
            await coordinator.submit(ScaleTo(size=1))
        cluster.hmm_answers = False
        with pytest.raises(HmmUnavailable, match="nobody answers"):
            await coordinator.submit(UP)
        assert not cluster.calls and coordinator.operations() == []

    run(main())


def test_kv_counts_as_room_down_to_what_a_rank_needs() -> None:
    """Ten chunks of KV, of which a rank needs two, have room for two columns (4 -> 2) and not for six (4 -> 1)."""
    full = 2 * COLUMN + DENSE + KV_CHUNKS * 250

    async def main() -> None:
        cluster = FakeCluster(active=(0, 1, 2, 3), columns=8, budget=full, kv_chunk=250)
        coordinator = cluster.coordinator()
        with pytest.raises(BudgetExceeded, match=r"device 0 needs 5\.86 KiB more and has 1\.95 KiB free") as refused:
            await coordinator.submit(ScaleTo(size=1))
        assert refused.value.device == 0 and not cluster.calls
        assert (await change(coordinator, ScaleTo(size=2))).phase is Phase.DONE

    run(main())


def test_status_shows_everything_and_survives_a_silent_hmm() -> None:
    async def main() -> None:
        cluster = up_cluster()
        coordinator = cluster.coordinator()
        await change(coordinator, ScaleTo(size=3))
        status = await coordinator.status()
        assert (status.ep_size, status.max_ep_size, status.epoch) == (3, 4, 1)
        assert status.membership == [0, 1, 2]
        assert [rank.state for rank in status.ranks] == [RankState.ACTIVE] * 3 + [RankState.STANDBY]
        assert sorted(map(status.placement.count, (0, 1, 2))) == [2, 3, 3]
        assert status.memory.available and status.memory.devices[0].by_kind["column"] > 0
        assert status.running is None and status.last is not None and status.last.phase is Phase.DONE
        assert msgspec.json.decode(msgspec.json.encode(status), type=type(status)) == status
        cluster.hmm_answers = False
        status = await coordinator.status()
        assert not status.memory.available and "nobody answers" in str(status.memory.error)

    run(main())


def test_close_rolls_a_preparing_change_back_and_takes_no_more() -> None:
    async def main() -> None:
        cluster = up_cluster(faults={"boot 2": "hang"})
        coordinator = cluster.coordinator()
        operation = await coordinator.submit(UP)
        await asyncio.sleep(0.02)
        await coordinator.close()
        ended = coordinator.get(operation.operation_id)
        assert ended is not None and ended.phase is Phase.ROLLED_BACK and "shutting down" in str(ended.error)
        cluster.check_settled(coordinator)
        with pytest.raises(OperationInProgress, match="shutting down"):
            await coordinator.submit(UP)

    run(main())


def test_close_ends_a_change_that_has_not_begun() -> None:
    async def main() -> None:
        cluster = up_cluster()
        coordinator = cluster.coordinator()
        operation = await coordinator.submit(UP)
        await coordinator.close()
        ended = coordinator.get(operation.operation_id)
        assert ended is not None and ended.phase is Phase.ROLLED_BACK
        cluster.check_settled(coordinator)

    run(main())


class Told(Observer):
    """What an observer was told."""

    def __init__(self) -> None:
        self.lost: list[int] = []
        self.recoveries: list[Recovery] = []
        self.ended: list[Operation] = []

    def on_operation_ended(self, operation: Operation) -> None:
        self.ended.append(operation)

    def on_rank_lost(self, rank: int) -> None:
        self.lost.append(rank)

    def on_recovered(self, recovery: Recovery) -> None:
        self.recoveries.append(recovery)


def test_a_loss_is_an_operation_and_observers_are_told() -> None:
    async def main() -> None:
        told, cluster = Told(), down_cluster()
        coordinator = cluster.coordinator(observer=told)
        cluster.lose(2)
        assert coordinator.running is not None and coordinator.running.cause is Cause.LOSS
        target = await coordinator.submit(ScaleTo(size=2))
        assert target.phase is Phase.PLANNED, "it waits for the recovery"
        assert coordinator.running.operation_id == target.operation_id
        done = await coordinator.wait(target.operation_id)
        assert done.phase is Phase.DONE and (done.old_ep_size, done.new_ep_size) == (3, 2)
        loss = next(each for each in coordinator.operations() if each.cause is Cause.LOSS)
        assert (loss.lost, loss.ranks_after, loss.resent_requests) == ([2], [0, 1, 3], 3)
        assert told.lost == [2] and [recovery.dead for recovery in told.recoveries] == [[2]]
        assert told.recoveries[0].ranks == [0, 1, 3] and told.recoveries[0].requests_resent == 3
        assert [each.operation_id for each in told.ended] == [target.operation_id]
        cluster.check_settled(coordinator)

    run(main())


calls = st.sampled_from(
    ["begin", "shrink_kv", "ranks.commit"] + [f"{verb} {rank}" for verb in ("boot", "pull") for rank in range(5)],
)
targets = st.one_of(
    st.builds(ScaleTo, size=st.integers(0, 6)),
    st.lists(st.integers(0, 5), max_size=3).map(lambda ranks: RetireRanks(ranks=tuple(ranks))),
)
steps = st.tuples(targets, st.dictionaries(calls, st.sampled_from(["raise_before", "raise_after"]), max_size=2))


@given(st.lists(steps, max_size=12), st.integers(1, 5), st.integers(1, 11))
@settings(max_examples=150, deadline=None)
def test_any_sequence_of_targets_and_faults_leaves_the_cluster_settled(
    sequence: list[tuple[Target, dict[str, str]]], size: int, columns: int
) -> None:
    async def main() -> None:
        cluster = FakeCluster(capacity=5, active=tuple(range(size)), columns=columns)
        coordinator = cluster.coordinator()
        for target, faults in sequence:
            cluster.faults = faults
            epoch = coordinator.view.epoch
            try:
                ended = await change(coordinator, target)
            except PlanError:
                continue
            cluster.check_settled(coordinator)
            assert ended.phase in (Phase.DONE, Phase.ROLLED_BACK)
            grew = ended.phase is Phase.DONE and ended.message != "Nothing had to change."
            assert coordinator.view.epoch == epoch + grew

    run(main())
