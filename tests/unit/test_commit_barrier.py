"""The commit barrier among real processes: one decision for all, whoever dies, stops or comes late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elasticmoe_sglang.comm.commit_barrier import COORDINATOR, MAX_ATTEMPTS, Attempts, CommitBarrier, Decision
from elasticmoe_sglang.comm.control_page import BARRIER_ARRIVAL, ControlPage, SharedMemory
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import CommitError
from tests.helpers import barrier_cases as cases
from tests.helpers.barrier_cases import DEADLINE_S, GRACE_S
from tests.helpers.workers import Failed, WorkerPool

pytestmark = pytest.mark.process


@pytest.fixture
def pool(tmp_path: Any) -> Iterator[WorkerPool]:
    pool = WorkerPool(4, scratch=str(tmp_path), with_groups=False, channels=1, window_bytes=16 << 10)
    pool.control.publish(cases.view((0, 1), 0, 4))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    """One pool for many examples; nobody is killed in it."""
    pool = WorkerPool(
        4, scratch=str(tmp_path_factory.mktemp("barrier")), with_groups=False, channels=1, window_bytes=16 << 10
    )
    pool.control.publish(cases.view((0, 1), 0, 4))
    yield pool
    pool.close()


def _until_arrived(pool: WorkerPool, rank: int) -> None:
    """Wait until a rank has arrived at the commit barrier (a joining rank: until it has seen the leader's proposal)."""
    word = pool.control.rank_word(rank, BARRIER_ARRIVAL)
    deadline = time.monotonic() + 20
    while pool.control.words[word] == 0:
        assert time.monotonic() < deadline, f"rank {rank} never arrived"
        time.sleep(0.005)


def _committed(results: dict[int, Any], ranks: tuple[int, ...], epoch: int) -> None:
    for rank, result in results.items():
        assert not isinstance(result, Failed), (rank, result)
        decision, reason, membership = result
        assert decision is Decision.COMMIT and reason == ""
        assert membership == Membership(ranks=ranks, epoch=epoch, capacity=4)


def test_old_members_and_a_joining_rank_commit_together(pool: WorkerPool) -> None:
    pool.submit(3, cases.join, 1, 10.0)  # waits long before anybody proposes
    time.sleep(0.3)
    for rank in (0, 1):
        pool.submit(rank, cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3))
    _committed({rank: pool.result(rank) for rank in (0, 1, 3)}, (0, 1, 3), 1)
    # A retiring rank is a participant, too.
    _committed(pool.run((0, 1, 3), cases.arrive, 2, 0, (0, 1, 3), (0, 3)), (0, 3), 2)
    assert pool.control.read_membership().ranks == (0, 3)


def test_the_deadline_aborts_and_the_next_attempt_can_commit(pool: WorkerPool) -> None:
    for rank in (0, 1):
        pool.submit(rank, cases.arrive, 1, 0, (0, 1, 2), (0, 1, 2))
    for rank in (0, 1):
        decision, reason, membership = pool.result(rank)
        assert decision is Decision.ABORT and "rank 2" in reason
        assert membership.epoch == 0, "an aborted change publishes nothing"
    # Who comes late to the aborted attempt is told at once, and is not taken for one of the next.
    assert pool.run((2,), cases.arrive, 1, 0, (0, 1, 2), (0, 1, 2))[2][0] is Decision.ABORT
    assert pool.seconds[2] < DEADLINE_S / 2
    _committed(pool.run((0, 1, 2), cases.arrive, 1, 1, (0, 1, 2), (0, 1, 2)), (0, 1, 2), 1)


def test_a_late_arrival_of_an_old_attempt_does_not_count_for_the_next(pool: WorkerPool) -> None:
    for rank in (0, 1):
        pool.submit(rank, cases.arrive, 1, 0, (0, 1, 2), (0, 1, 2))
    assert [pool.result(rank)[0] for rank in (0, 1)] == [Decision.ABORT] * 2
    for rank in (0, 1):
        pool.submit(rank, cases.arrive, 1, 1, (0, 1, 2), (0, 1, 2))
    assert pool.run((2,), cases.arrive, 1, 0, (0, 1, 2), (0, 1, 2))[2][0] is Decision.ABORT
    assert [pool.result(rank)[0] for rank in (0, 1)] == [Decision.ABORT] * 2
    assert pool.control.read_membership().epoch == 0


def test_a_killed_joining_rank_aborts_before_the_deadline(pool: WorkerPool) -> None:
    pool.submit(3, cases.join, 1, 10.0)
    time.sleep(0.1)
    pool.kill(3)
    for rank in (0, 1):
        pool.submit(rank, cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3), 0.0, 30.0)
    for rank in (0, 1):
        decision, reason, membership = pool.result(rank)
        assert decision is Decision.ABORT and "rank 3 is gone" in reason and membership.epoch == 0
        assert pool.seconds[rank] < 5
    # A fresh joining rank is not fooled by the aborted proposal, which named its rank.
    pool.start(3)
    pool.submit(3, cases.join, 1, 10.0)
    time.sleep(0.1)
    for rank in (0, 1):
        pool.submit(rank, cases.arrive, 1, 1, (0, 1, 3), (0, 1, 3))
    _committed({rank: pool.result(rank) for rank in (0, 1, 3)}, (0, 1, 3), 1)


def test_a_killed_leader_is_named_by_the_others(pool: WorkerPool) -> None:
    pool.submit(3, cases.join, 1, 10.0)
    pool.submit(0, cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3), 0.0, 30.0)  # it waits for rank 1
    _until_arrived(pool, 3)
    pool.kill(0)
    pool.submit(1, cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3), 0.0, 30.0)
    for rank in (1, 3):
        result = pool.result(rank)
        assert isinstance(result, Failed) and isinstance(result.error, CommitError), result
        assert result.error.rank == 0 and "gone" in str(result.error)
    assert pool.seconds[1] < 5
    assert pool.control.read_membership().epoch == 0


def test_a_joining_rank_notices_that_the_leader_died_before_any_proposal(pool: WorkerPool) -> None:
    pool.submit(3, cases.join, 1, 10.0)
    time.sleep(0.1)
    pool.kill(0)
    result = pool.result(3)
    assert isinstance(result, Failed) and isinstance(result.error, CommitError), result
    assert result.error.rank == 0 and result.seconds < 5


def test_a_leader_that_was_stopped_obeys_what_the_others_decided(pool: WorkerPool) -> None:
    pool.submit(3, cases.join, 1, 10.0)
    pool.submit(0, cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3), 0.0, 3.0)
    _until_arrived(pool, 3)
    pool.stop(0)
    result = pool.try_run((1,), cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3))[1]
    assert isinstance(result.error, CommitError) and result.error.rank == 0
    assert GRACE_S < result.seconds < DEADLINE_S + GRACE_S + 3
    assert isinstance(pool.result(3).error, CommitError)
    pool.resume(0)
    decision, reason, membership = pool.result(0)
    assert decision is Decision.ABORT and "rank 0" in reason and membership.epoch == 0


def test_a_joining_rank_gives_up_after_its_time_and_when_it_was_left_out(pool: WorkerPool) -> None:
    result = pool.try_run((3,), cases.join, 1, 0.2)[3]
    assert isinstance(result.error, CommitError) and 0.2 <= result.seconds < 2
    pool.submit(3, cases.join, 1, 10.0)
    _committed(pool.run((0, 1), cases.arrive, 1, 0, (0, 1), (0, 1)), (0, 1), 1)
    _committed(pool.run((0, 1), cases.arrive, 2, 0, (0, 1), (0,)), (0,), 2)
    result = pool.result(3)
    assert isinstance(result.error, CommitError) and "went on" in str(result.error)


def test_a_waiting_joining_rank_sleeps(pool: WorkerPool) -> None:
    assert pool.run((3,), cases.cpu_of_waiting, 1.0)[3] < 0.05


delays = st.floats(0, 0.03)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    others=st.sets(st.sampled_from([1, 2, 3]), min_size=1),
    waits=st.lists(delays, min_size=4, max_size=4),
)
def test_any_order_of_arrival_gives_one_decision(
    lasting: WorkerPool, data: st.DataObject, others: set[int], waits: list[float]
) -> None:
    epoch = lasting.next_epoch()
    participants = (0, *sorted(others))
    joining_ranks = data.draw(st.sets(st.sampled_from(sorted(others))))
    absent = data.draw(st.none() | st.sampled_from(sorted(others - joining_ranks))) if others - joining_ranks else None
    timeout_s = 0.1 if absent is not None else 10.0
    before = lasting.control.read_membership()
    came = [rank for rank in participants if rank != absent]
    for rank in came:
        if rank in joining_ranks:
            lasting.submit(rank, cases.join, epoch, 10.0)
        else:
            lasting.submit(rank, cases.arrive, epoch, 0, participants, participants, waits[rank], timeout_s)
    results = {rank: lasting.result(rank) for rank in came}
    expected = Decision.COMMIT if absent is None else Decision.ABORT
    for result in results.values():
        assert result[0] is expected
        assert result[2].epoch == (epoch if absent is None else before.epoch)
        assert result[2].ranks == (participants if absent is None else before.ranks)


def withdrawing(pool: WorkerPool) -> CommitBarrier:
    return CommitBarrier(ControlPage(SharedMemory(pool.fd)), COORDINATOR)


def test_a_proposal_past_its_deadline_cannot_commit(pool: WorkerPool) -> None:
    """The leader is last, and late: the coordinator has given the change up by then."""
    pool.submit(1, cases.arrive, 1, 0, (0, 1), (0, 1), 0.0, 3.0)
    _until_arrived(pool, 1)
    pool.submit(0, cases.arrive, 1, 0, (0, 1), (0, 1), 0.0, 0.0)
    for rank in (0, 1):
        decision, reason, membership = pool.result(rank)
        assert decision is Decision.ABORT and "deadline" in reason
        assert membership.epoch == 0
    _committed(pool.run((0, 1), cases.arrive, 1, 1, (0, 1), (0, 1)), (0, 1), 1)


def test_who_gives_up_decides(pool: WorkerPool) -> None:
    """After the coordinator has withdrawn a proposal, nobody can commit it, however late all of them come."""
    coordinator = withdrawing(pool)
    assert coordinator.withdraw(1, 5) is Decision.ABORT
    for decision, reason, membership in pool.run((0, 1), cases.arrive, 1, 5, (0, 1), (0, 1)).values():
        assert decision is Decision.ABORT and "withdrawn" in reason and membership.epoch == 0
    _committed(pool.run((0, 1), cases.arrive, 1, 6, (0, 1), (0, 1)), (0, 1), 1)
    # And what was committed cannot be withdrawn.
    assert coordinator.withdraw(1, 6) is Decision.COMMIT
    assert pool.control.read_membership().epoch == 1


def test_withdrawing_and_arriving_at_once_end_in_one_decision(lasting: WorkerPool) -> None:
    coordinator = withdrawing(lasting)
    for trial in range(20):
        now = lasting.control.read_membership()
        attempt = 1000 + trial
        for rank in (0, 1):
            lasting.submit(rank, cases.arrive, now.epoch + 1, attempt, (0, 1), (0, 1))
        time.sleep(trial * 2e-4)
        decision = coordinator.withdraw(now.epoch + 1, attempt)
        assert {lasting.result(rank)[0] for rank in (0, 1)} == {decision}
        assert lasting.control.read_membership().epoch == now.epoch + (decision is Decision.COMMIT)


def test_attempts_start_again_with_every_epoch() -> None:
    attempts = Attempts()
    assert [attempts.next(4), attempts.next(4), attempts.next(5), attempts.next(5)] == [1, 2, 1, 2]
    attempts = Attempts()
    for _ in range(MAX_ATTEMPTS):
        attempts.next(9)
    with pytest.raises(CommitError, match="attempts"):
        attempts.next(9)
