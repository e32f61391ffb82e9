"""An abort reaches a request that is on its way, and none that was sent after it was dealt with."""

from __future__ import annotations

from elasticmoe_patches.worker.requests import REMEMBERED_S, RecentAborts


def test_an_abort_reaches_what_arrives_after_it() -> None:
    aborts = RecentAborts()
    aborts.add("a-1", False)
    assert aborts.reaches("a-1") and aborts.reaches("a-1_0")
    assert not aborts.reaches("a")
    aborts.add(None, True)
    assert aborts.reaches("b")
    aborts.clear()
    assert not aborts.reaches("a-1") and not aborts.reaches("b")


def test_old_aborts_are_forgotten() -> None:
    """A server that never changes its size gets aborts for weeks; and a client may use an id again."""
    now = 0.0
    aborts = RecentAborts(clock=lambda: now)
    for second in range(10_000):
        now = float(second)
        aborts.add(f"r-{second}", second == 5)
    assert len(aborts) <= REMEMBERED_S + 1
    assert aborts.reaches("r-9999") and not aborts.reaches("r-17")
    now += 2 * REMEMBERED_S
    assert not aborts.reaches("r-9999")
