"""Which worker's outputs count no more."""

from __future__ import annotations

from elasticmoe_sglang.coordinator.incarnations import Incarnations


def test_an_exit_that_is_reported_after_the_next_boot_was_asked_for_ends_the_earlier_one() -> None:
    """Once it barred the new worker: every request that came to its rank stood still for ever."""
    known = Incarnations()
    first, second = known.next(), known.next()
    known.assigned(71, first)
    known.exited(0, 71, -9, serving=True)
    known.assigned(72, second)
    assert first != second and known.gone == {(0, first)}


def test_workers_of_the_start_and_another_imm_that_does_not_know() -> None:
    known = Incarnations()
    known.assigned(70, 0)
    later = known.next()
    known.assigned(71, later)
    known.assigned(71, 0)
    known.exited(1, 71, -9, serving=True)
    known.exited(0, 70, -9, serving=True)
    assert known.gone == {(1, later), (0, 0)}


def test_only_a_serving_worker_that_was_not_killed_throws_suspicion_on_requests() -> None:
    """Once a replacement that could not boot, because its HMM had died, threw it on the requests of killed ranks."""
    known = Incarnations()
    known.exited(0, 70, -9, serving=True)
    known.exited(0, 71, 1, serving=False)
    assert not known.take_suspicion()
    known.exited(0, 72, -11, serving=True)
    assert known.take_suspicion() and not known.take_suspicion()
    known.stalled(73)
    known.exited(0, 73, -9, serving=True)
    assert known.take_suspicion()
