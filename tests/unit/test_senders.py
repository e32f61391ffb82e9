"""Tokens of a worker that is dead do not count once its requests have been sent to others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from elasticmoe_patches.senders import Senders, tag


def output(rank: int, incarnation: int, requests: int = 2) -> Any:
    return SimpleNamespace(dp_ranks=[tag(rank, incarnation)] * requests)


def test_an_output_names_its_rank_when_it_has_passed() -> None:
    senders, passed = Senders(), output(63, 12345)
    assert senders.admit(passed) and passed.dp_ranks == [63, 63]
    assert senders.admit(SimpleNamespace(dp_ranks=None)) and senders.admit(SimpleNamespace())


def test_what_comes_late_of_a_dead_worker_is_dropped_and_its_successor_is_heard() -> None:
    senders = Senders()
    assert senders.admit(output(2, 0))
    senders.bar({(2, 0)})
    assert not senders.admit(output(2, 0))
    assert senders.admit(output(2, 7)) and senders.admit(output(1, 0))
    senders.bar([(2, 7)])
    assert not senders.admit(output(2, 7)) and not senders.admit(output(2, 0)) and senders.admit(output(2, 9))
