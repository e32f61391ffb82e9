"""Ranks that die, stop, start late or come in any order: a typed error that names them, or no harm at all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from elasticmoe_sglang.errors import CollectiveError, CollectiveMismatch, PeerDied, PeerTimeout
from tests.helpers import fault_cases as cases
from tests.helpers.workers import Failed, WorkerPool

pytestmark = pytest.mark.process

DEADLINE_S = 2.0


@pytest.fixture
def pool(tmp_path: Any) -> Iterator[WorkerPool]:
    pool = WorkerPool(4, scratch=str(tmp_path), timeout_s=DEADLINE_S, window_bytes=64 << 10)
    yield pool
    pool.close()


@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "broadcast", "reduce_scatter", "small", "barrier"])
def test_a_killed_rank_is_named_at_once_by_everybody(pool: WorkerPool, name: str) -> None:
    ranks, epoch = (0, 1, 3), pool.next_epoch()
    for rank in ranks:
        pool.submit(rank, cases.endless, ranks, epoch, name)
    time.sleep(0.2)
    pool.kill(3)
    for rank in (0, 1):
        result = pool.result(rank)
        assert isinstance(result, Failed) and isinstance(result.error, PeerDied), result
        assert result.error.rank == 3 and result.error.epoch == epoch
        expected = "all_reduce" if name == "small" else name
        assert expected.replace("_", "") in str(result.error).replace("_", ""), result.error
    # Fails fast in this epoch, works in the next, with the rest and with a fresh process in the rank.
    for result in pool.try_run((0, 1), cases.add_up, ranks, epoch).values():
        assert isinstance(result.error, PeerDied) and result.seconds < DEADLINE_S / 2
    assert pool.run((0, 1), cases.add_up, (0, 1), pool.next_epoch()) == {0: 3, 1: 3}
    pool.start(3)
    assert pool.run(ranks, cases.add_up, ranks, pool.next_epoch()) == {0: 7, 1: 7, 3: 7}


def test_a_rank_whose_process_was_replaced_is_dead_too(pool: WorkerPool) -> None:
    ranks, epoch = (0, 2), pool.next_epoch()
    pool.run(ranks, cases.add_up, ranks, epoch)
    pool.submit(0, cases.add_up, ranks, epoch)
    pool.kill(2)
    pool.start(2, wait=False)  # a fresh standby registers before anybody looks
    result = pool.result(0)
    assert isinstance(result, Failed) and isinstance(result.error, PeerDied) and result.error.rank == 2
    pool.result(2)


def test_a_stopped_rank_is_named_at_the_deadline_and_learns_of_it(pool: WorkerPool) -> None:
    ranks, epoch = (0, 1, 2), pool.next_epoch()
    pool.run(ranks, cases.add_up, ranks, epoch)
    pool.stop(2)
    for rank in (0, 1):
        pool.submit(rank, cases.add_up, ranks, epoch)
    for rank in (0, 1):
        result = pool.result(rank)
        assert isinstance(result, Failed) and isinstance(result.error, PeerTimeout), result
        assert result.error.rank == 2 and result.error.epoch == epoch
        assert "allreduce" in str(result.error)
        # One may also learn it from the other, whose clock began earlier.
        assert DEADLINE_S * 0.5 <= result.seconds < DEADLINE_S + 3
    pool.resume(2)
    late = pool.try_run((2,), cases.add_up, ranks, epoch)[2]
    assert isinstance(late.error, PeerTimeout) and late.error.rank == 2 and late.seconds < DEADLINE_S / 2
    # The others may go on without it, and it does not disturb them when it still believes in the old epoch.
    after = pool.next_epoch()
    pool.submit(2, cases.add_up, ranks, epoch)
    assert pool.run((0, 1), cases.add_up, (0, 1), after) == {0: 3, 1: 3}
    assert isinstance(pool.result(2).error, CollectiveError)
    assert pool.run((0, 1), cases.add_up, (0, 1), after) == {0: 3, 1: 3}
    assert pool.run(ranks, cases.add_up, ranks, pool.next_epoch()) == {0: 6, 1: 6, 2: 6}


def test_a_rank_left_in_an_old_epoch_is_told(pool: WorkerPool) -> None:
    old = pool.next_epoch()
    pool.run((0, 1, 2), cases.add_up, (0, 1, 2), old)
    pool.submit(2, cases.add_up, (0, 1, 2), old)
    time.sleep(0.1)
    pool.run((0, 1), cases.add_up, (0, 1), pool.next_epoch())
    result = pool.result(2)
    assert isinstance(result, Failed) and isinstance(result.error, CollectiveMismatch)
    assert result.error.rank in (0, 1) and result.seconds < DEADLINE_S


def test_a_stopped_rank_that_resumes_in_time_does_no_harm(pool: WorkerPool) -> None:
    ranks, epoch = (0, 1), pool.next_epoch()
    pool.run(ranks, cases.add_up, ranks, epoch)
    pool.stop(1)
    for rank in ranks:
        pool.submit(rank, cases.add_up, ranks, epoch)
    time.sleep(0.4)
    pool.resume(1)
    assert [pool.result(rank) for rank in ranks] == [3, 3]


def test_a_rank_that_starts_late_is_waited_for(tmp_path: Any) -> None:
    pool = WorkerPool(4, scratch=str(tmp_path), ranks=(0,), timeout_s=20.0, window_bytes=16 << 10)
    try:
        pool.submit(0, cases.add_up, (0, 2), 1)
        time.sleep(0.3)  # longer than a look for dead peers takes: nobody registered is not dead
        pool.start(2)
        pool.submit(2, cases.add_up, (0, 2), 1)
        assert (pool.result(0), pool.result(2)) == (4, 4)
    finally:
        pool.close()


@pytest.mark.parametrize("ranks", [(0, 1), (0, 1, 2, 3), (0, 2, 3)])
def test_many_steps_with_random_delays(tmp_path: Any, ranks: tuple[int, ...]) -> None:
    pool = WorkerPool(4, scratch=str(tmp_path), ranks=ranks, window_bytes=16 << 10)
    try:
        for seed in range(3):
            results = pool.run(ranks, cases.many_steps, ranks, pool.next_epoch(), 300, seed)
            assert len({tuple(sums) for sums in results.values()}) == 1
    finally:
        pool.close()


def test_sleepers_are_woken(tmp_path: Any) -> None:
    ranks, steps = (0, 1, 2), 200
    pool = WorkerPool(3, scratch=str(tmp_path), window_bytes=12 << 10)
    try:
        pool.run(ranks, cases.late_rank_barriers, ranks, 1, steps)
        # Nobody relied on looking up every 50 ms.
        assert pool.seconds[0] < steps * 0.02
    finally:
        pool.close()


def test_a_waiting_rank_does_not_burn_its_core(tmp_path: Any) -> None:
    pool = WorkerPool(2, scratch=str(tmp_path), window_bytes=8 << 10)
    try:
        pool.submit(0, cases.cpu_seconds_while_waiting, 1)
        pool.submit(1, cases.add_up, (0, 1), 1, 1.0)
        assert pool.result(0) < 0.1, "a second of waiting costs less than a tenth of a second of processor time"
        assert pool.result(1) == 3
    finally:
        pool.close()
