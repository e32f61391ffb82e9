"""The commit gate among real processes: one decision for all, whoever dies, stops or comes late."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elasticmoe_sglang.errors import CommitError
from elasticmoe_sglang.seats.control import GATE_ARRIVAL
from elasticmoe_sglang.seats.gate import Decision
from elasticmoe_sglang.seats.membership import Membership
from tests.helpers import gate_cases as cases
from tests.helpers.gate_cases import DEADLINE_S, GRACE_S
from tests.helpers.seats import Failed, SeatPool


@pytest.fixture
def pool(tmp_path: Any) -> Iterator[SeatPool]:
    pool = SeatPool(4, scratch=str(tmp_path), with_groups=False, channels=1, window_bytes=16 << 10)
    pool.control.publish_membership(Membership(seats=(0, 1), epoch=0, capacity=4))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeatPool]:
    """One pool for many examples; nobody is killed in it."""
    pool = SeatPool(
        4, scratch=str(tmp_path_factory.mktemp("gate")), with_groups=False, channels=1, window_bytes=16 << 10
    )
    pool.control.publish_membership(Membership(seats=(0, 1), epoch=0, capacity=4))
    yield pool
    pool.close()


def _until_arrived(pool: SeatPool, seat: int) -> None:
    """Wait until a seat has arrived at the gate (a joiner: until it has seen the leader's proposal)."""
    word = pool.control.seat_word(seat, GATE_ARRIVAL)
    deadline = time.monotonic() + 20
    while pool.control.words[word] == 0:
        assert time.monotonic() < deadline, f"seat {seat} never arrived"
        time.sleep(0.005)


def _committed(results: dict[int, Any], seats: tuple[int, ...], epoch: int) -> None:
    for seat, result in results.items():
        assert not isinstance(result, Failed), (seat, result)
        decision, reason, membership = result
        assert decision is Decision.COMMIT and reason == ""
        assert membership == Membership(seats=seats, epoch=epoch, capacity=4)


def test_old_members_and_a_joiner_commit_together(pool: SeatPool) -> None:
    pool.submit(3, cases.join, 1, 10.0)  # waits long before anybody proposes
    time.sleep(0.3)
    for seat in (0, 1):
        pool.submit(seat, cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3))
    _committed({seat: pool.result(seat) for seat in (0, 1, 3)}, (0, 1, 3), 1)
    # A leaver is a participant, too.
    _committed(pool.run((0, 1, 3), cases.arrive, 2, 0, (0, 1, 3), (0, 3)), (0, 3), 2)
    assert pool.control.read_membership().seats == (0, 3)


def test_the_deadline_aborts_and_the_next_attempt_can_commit(pool: SeatPool) -> None:
    for seat in (0, 1):
        pool.submit(seat, cases.arrive, 1, 0, (0, 1, 2), (0, 1, 2))
    for seat in (0, 1):
        decision, reason, membership = pool.result(seat)
        assert decision is Decision.ABORT and "seat 2" in reason
        assert membership.epoch == 0, "an aborted change publishes nothing"
    # Who comes late to the aborted attempt is told at once, and is not taken for one of the next.
    assert pool.run((2,), cases.arrive, 1, 0, (0, 1, 2), (0, 1, 2))[2][0] is Decision.ABORT
    assert pool.seconds[2] < DEADLINE_S / 2
    _committed(pool.run((0, 1, 2), cases.arrive, 1, 1, (0, 1, 2), (0, 1, 2)), (0, 1, 2), 1)


def test_a_late_arrival_of_an_old_attempt_does_not_count_for_the_next(pool: SeatPool) -> None:
    for seat in (0, 1):
        pool.submit(seat, cases.arrive, 1, 0, (0, 1, 2), (0, 1, 2))
    assert [pool.result(seat)[0] for seat in (0, 1)] == [Decision.ABORT] * 2
    for seat in (0, 1):
        pool.submit(seat, cases.arrive, 1, 1, (0, 1, 2), (0, 1, 2))
    assert pool.run((2,), cases.arrive, 1, 0, (0, 1, 2), (0, 1, 2))[2][0] is Decision.ABORT
    assert [pool.result(seat)[0] for seat in (0, 1)] == [Decision.ABORT] * 2
    assert pool.control.read_membership().epoch == 0


def test_a_killed_joiner_aborts_before_the_deadline(pool: SeatPool) -> None:
    pool.submit(3, cases.join, 1, 10.0)
    time.sleep(0.1)
    pool.kill(3)
    for seat in (0, 1):
        pool.submit(seat, cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3), 0.0, 30.0)
    for seat in (0, 1):
        decision, reason, membership = pool.result(seat)
        assert decision is Decision.ABORT and "seat 3 is gone" in reason and membership.epoch == 0
        assert pool.seconds[seat] < 5
    # A fresh joiner is not fooled by the aborted proposal, which named its seat.
    pool.start(3)
    pool.submit(3, cases.join, 1, 10.0)
    time.sleep(0.1)
    for seat in (0, 1):
        pool.submit(seat, cases.arrive, 1, 1, (0, 1, 3), (0, 1, 3))
    _committed({seat: pool.result(seat) for seat in (0, 1, 3)}, (0, 1, 3), 1)


def test_a_killed_leader_is_named_by_the_others(pool: SeatPool) -> None:
    pool.submit(3, cases.join, 1, 10.0)
    pool.submit(0, cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3), 0.0, 30.0)  # it waits for seat 1
    _until_arrived(pool, 3)
    pool.kill(0)
    pool.submit(1, cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3), 0.0, 30.0)
    for seat in (1, 3):
        result = pool.result(seat)
        assert isinstance(result, Failed) and isinstance(result.error, CommitError), result
        assert result.error.seat == 0 and "gone" in str(result.error)
    assert pool.seconds[1] < 5
    assert pool.control.read_membership().epoch == 0


def test_a_joiner_notices_that_the_leader_died_before_any_proposal(pool: SeatPool) -> None:
    pool.submit(3, cases.join, 1, 10.0)
    time.sleep(0.1)
    pool.kill(0)
    result = pool.result(3)
    assert isinstance(result, Failed) and isinstance(result.error, CommitError), result
    assert result.error.seat == 0 and result.seconds < 5


def test_a_leader_that_was_stopped_obeys_what_the_others_decided(pool: SeatPool) -> None:
    pool.submit(3, cases.join, 1, 10.0)
    pool.submit(0, cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3), 0.0, 3.0)
    _until_arrived(pool, 3)
    pool.stop(0)
    result = pool.try_run((1,), cases.arrive, 1, 0, (0, 1, 3), (0, 1, 3))[1]
    assert isinstance(result.error, CommitError) and result.error.seat == 0
    assert GRACE_S < result.seconds < DEADLINE_S + GRACE_S + 3
    assert isinstance(pool.result(3).error, CommitError)
    pool.resume(0)
    decision, reason, membership = pool.result(0)
    assert decision is Decision.ABORT and "seat 0" in reason and membership.epoch == 0


def test_a_joiner_gives_up_after_its_time_and_when_it_was_left_out(pool: SeatPool) -> None:
    result = pool.try_run((3,), cases.join, 1, 0.2)[3]
    assert isinstance(result.error, CommitError) and 0.2 <= result.seconds < 2
    pool.submit(3, cases.join, 1, 10.0)
    _committed(pool.run((0, 1), cases.arrive, 1, 0, (0, 1), (0, 1)), (0, 1), 1)
    _committed(pool.run((0, 1), cases.arrive, 2, 0, (0, 1), (0,)), (0,), 2)
    result = pool.result(3)
    assert isinstance(result.error, CommitError) and "went on" in str(result.error)


def test_a_waiting_joiner_sleeps(pool: SeatPool) -> None:
    assert pool.run((3,), cases.cpu_of_waiting, 1.0)[3] < 0.05


delays = st.floats(0, 0.03)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    others=st.sets(st.sampled_from([1, 2, 3]), min_size=1),
    waits=st.lists(delays, min_size=4, max_size=4),
)
def test_any_order_of_arrival_gives_one_decision(
    lasting: SeatPool, data: st.DataObject, others: set[int], waits: list[float]
) -> None:
    epoch = lasting.next_epoch()
    participants = (0, *sorted(others))
    joiners = data.draw(st.sets(st.sampled_from(sorted(others))))
    absent = data.draw(st.none() | st.sampled_from(sorted(others - joiners))) if others - joiners else None
    timeout_s = 0.1 if absent is not None else 10.0
    before = lasting.control.read_membership()
    came = [seat for seat in participants if seat != absent]
    for seat in came:
        if seat in joiners:
            lasting.submit(seat, cases.join, epoch, 10.0)
        else:
            lasting.submit(seat, cases.arrive, epoch, 0, participants, participants, waits[seat], timeout_s)
    results = {seat: lasting.result(seat) for seat in came}
    expected = Decision.COMMIT if absent is None else Decision.ABORT
    for result in results.values():
        assert result[0] is expected
        assert result[2].epoch == (epoch if absent is None else before.epoch)
        assert result[2].seats == (participants if absent is None else before.seats)
