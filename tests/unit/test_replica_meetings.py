"""The ranks of an attention replica do in one iteration what has come to all of them, and end where they differ."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches.senders import Senders
from elasticmoe_patches.services import SglangRouter
from elasticmoe_patches.srt.managers.communicator import ATTRIBUTE
from elasticmoe_patches.worker import orders as orders_module
from elasticmoe_patches.worker.inbox import MigrationInbox
from elasticmoe_patches.worker.orders import _arrivals, _compose
from elasticmoe_patches.worker.replica import Arrivals, Replica, ReplicaLost
from elasticmoe_patches.worker.worker import RecoveryInbox
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.worker.kv import Resized, ResizeJobs

pytestmark = pytest.mark.process

MATES = (2, 3)


class Table:
    """Where the ranks of one replica put their rows; stands for the process group."""

    def __init__(self) -> None:
        self._rows: dict[int, list[int]] = {}
        self._barrier = threading.Barrier(len(MATES), timeout=10)

    def gather(self, rank: int, mine: list[int]) -> list[list[int]]:
        self._rows[rank] = mine
        self._barrier.wait()
        rows = [self._rows[mate] for mate in MATES]
        self._barrier.wait()
        return rows


class Rank(Replica):
    """A rank that meets the other one at a table."""

    def __init__(self, table: Table, rank: int, *, available: int = 100, waiting: int = 0) -> None:
        self.scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=SimpleNamespace(available_size=lambda: available),
            waiting_queue=[None] * waiting,
            last_batch=None,
            running_batch=SimpleNamespace(reqs=[]),
            chunked_req=None,
            grammar_manager=SimpleNamespace(grammar_queue=[]),
        )
        self.jobs = ResizeJobs()
        self.living = set(MATES)
        control: Any = SimpleNamespace(alive=lambda other: other in self.living)
        super().__init__(self.scheduler, rank, MATES, self.jobs, control)
        self._table = table

    def _gather(self, mine: list[int]) -> list[list[int]]:
        return self._table.gather(self._rank, mine)

    def resize_asked(self, tokens: int) -> None:
        threading.Thread(target=self._ask, args=(tokens,), daemon=True).start()
        while self.jobs.claim() is None:
            pass
        self.jobs.unclaim()

    def _ask(self, tokens: int) -> None:
        self.jobs.ask(tokens, 30.0, lambda: None)


def both(call: Callable[[Rank], Any], *ranks: Rank) -> list[Any]:
    """What each rank's call returns or raises, both at the same time."""
    found: dict[int, Any] = {}

    def run(rank: Rank) -> None:
        try:
            found[rank._rank] = call(rank)
        except WorkerError as error:
            found[rank._rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [found[mate] for mate in MATES]


@pytest.fixture
def pair() -> tuple[Rank, Rank]:
    table = Table()
    return Rank(table, 2), Rank(table, 3)


def test_kv_is_resized_once_both_are_ready(pair: tuple[Rank, Rank]) -> None:
    done: list[int] = []

    def resize(tokens: int) -> Resized:
        done.append(tokens)
        return Resized(tokens=tokens)

    def step(rank: Rank) -> Any:
        return rank.agree(resize, orders=False)

    pair[0].resize_asked(64)
    both(step, *pair)
    assert done == []
    pair[1].resize_asked(32)  # another capacity
    both(step, *pair)
    assert done == []
    pair[1].jobs.claim()
    pair[1].jobs.run_claimed(lambda tokens: Resized(tokens=tokens))
    pair[1].resize_asked(64)
    both(step, *pair)
    assert done == [64, 64]
    both(step, *pair)
    assert done == [64, 64]


def test_a_commit_is_taken_when_both_have_it(pair: tuple[Rank, Rank]) -> None:
    have: dict[int, tuple[int, int] | None] = {2: (5, 1), 3: None}

    def step(rank: Rank) -> Any:
        return rank.agree(lambda tokens: Resized(tokens=tokens), orders=False, commit=have[rank._rank])

    assert both(step, *pair) == [(False, False), (False, False)]
    have[3] = (5, 2)  # the next attempt
    assert both(step, *pair) == [(False, False), (False, False)]
    have[2] = (5, 2)
    assert both(step, *pair) == [(False, True), (False, True)]


def test_only_the_leader_has_orders(pair: tuple[Rank, Rank]) -> None:
    for leads, expected in ((2, True), (3, False)):
        answers = both(
            lambda rank, leads=leads: rank.agree(lambda t: Resized(tokens=t), orders=rank._rank == leads),  # type: ignore[misc]
            *pair,
        )
        assert answers == [(expected, False)] * 2


@pytest.mark.parametrize("change", [{"available": 99}, {"waiting": 1}])
def test_ranks_that_differ_end(change: dict[str, int]) -> None:
    table = Table()
    pair = Rank(table, 2), Rank(table, 3, **change)
    for error in both(lambda rank: rank.agree(lambda t: Resized(tokens=t), orders=False), *pair):
        assert isinstance(error, WorkerError)
        assert "the ranks of an attention replica differ in free KV tokens, waiting and running requests" in str(error)
        assert "2 has [100, 0, 0], 3 has [" in str(error)


def test_ranks_with_other_tokens_end_after_a_loss() -> None:
    table = Table()
    pair = Rank(table, 2), Rank(table, 3)

    def request(*output: int) -> Any:
        return SimpleNamespace(rid="a", origin_input_ids=[1, 2], output_ids=list(output), finished=lambda: False)

    pair[0].scheduler.waiting_queue, pair[1].scheduler.waiting_queue = [request(5)], [request(5)]
    assert both(lambda rank: rank.require_same_requests(), *pair) == [None, None]
    pair[1].scheduler.waiting_queue = [request(5, 6)]
    errors = both(lambda rank: rank.require_same_requests(), *pair)
    assert all("differ in their requests" in str(error) for error in errors)


def test_the_least_capacity_holds_for_both(pair: tuple[Rank, Rank]) -> None:
    assert both(lambda rank: rank.least(10 * rank._rank), *pair) == [20, 20]


def test_a_rank_ends_when_another_one_of_its_replica_is_gone(pair: tuple[Rank, Rank]) -> None:
    pair[0].leave_if_one_is_lost()
    pair[0].living.discard(3)
    with pytest.raises(ReplicaLost):
        pair[0].leave_if_one_is_lost()


# Orders ---------------------------------------------------------------------------------------------------------------


class Inbox:
    """A rank's worker, as far as its orders go."""

    def __init__(self, *, leads: bool) -> None:
        self.leads = leads
        self.inbox = MigrationInbox()
        self.recovery = RecoveryInbox()

    def arrivals(self) -> Arrivals:
        return _arrivals(self)  # type: ignore[arg-type]


def message(rid: str) -> Any:
    return SimpleNamespace(request=SimpleNamespace(rid=rid))


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> tuple[Inbox, Inbox]:
    """A replica to which rank 4 migrates two requests."""
    from elasticmoe_patches.srt.managers import io_struct

    monkeypatch.setattr(io_struct, "to_wire", lambda each: each.request.rid.encode())
    leader, other = Inbox(leads=True), Inbox(leads=False)
    for rank in (leader, other):
        rank.inbox.expect("o", [4])
    for rid in ("a", "b"):
        leader.inbox.arrived("o", 4, message(rid))
    leader.inbox.all_sent("o", 4, 2)
    return leader, other


def compose(leader: Inbox, other: Inbox) -> orders_module.Orders:
    return _compose(leader, [leader.arrivals(), other.arrivals()])  # type: ignore[arg-type]


def window() -> Any:
    return SimpleNamespace(close=lambda: None)


def test_requests_resume_when_every_rank_may(ranks: tuple[Inbox, Inbox]) -> None:
    leader, other = ranks
    leader.inbox.release("o", 4)
    assert compose(leader, other).retirements == []
    other.inbox.release("o", 4)
    assert compose(leader, other).retirements == [(("o", 4), False, [b"a", b"b"])]


@pytest.mark.parametrize(("windows", "copied"), [((True, True), True), ((True, False), False), ((False, True), False)])
def test_kv_is_copied_only_where_every_rank_can(
    ranks: tuple[Inbox, Inbox], windows: tuple[bool, bool], copied: bool
) -> None:
    for rank, mapped in zip(ranks, windows, strict=True):
        rank.inbox.map_window("o", 4, window() if mapped else None)
        rank.inbox.release("o", 4)
    assert compose(*ranks).retirements == [(("o", 4), copied, [b"a", b"b"])]


def test_the_leader_says_who_was_aborted_on_the_way(ranks: tuple[Inbox, Inbox]) -> None:
    leader, other = ranks
    for rank in ranks:
        rank.inbox.release("o", 4)
    leader.inbox.aborted.add("b", everything=False)
    leader.recovery.sent_again.append(message("c"))
    found = compose(leader, other)
    assert found.aborted == {"b"} and found.sent_again == [b"c"] and leader.recovery.sent_again == []


def test_requests_are_given_up_when_every_rank_was_asked(ranks: tuple[Inbox, Inbox]) -> None:
    leader, other = ranks
    asked: Any = SimpleNamespace(operation_id="spread-1")
    leader.recovery.give_ups.append(asked)
    assert compose(leader, other).give_ups == ()
    other.recovery.give_ups.append(asked)
    assert compose(leader, other).give_ups == ("spread-1",)


def test_what_a_dead_rank_has_sent_is_not_resumed(ranks: tuple[Inbox, Inbox]) -> None:
    leader, other = ranks
    for rank in ranks:
        rank.inbox.release("o", 4)
    leader.inbox.forget(4)
    assert compose(leader, other).retirements == []


# Outputs --------------------------------------------------------------------------------------------------------------


def test_a_replica_sends_its_outputs_by_its_leader() -> None:
    """They have the replica's number, and the incarnation of the rank that leads it."""
    tokenizer: Any = SimpleNamespace(**{ATTRIBUTE: None})
    router = SglangRouter(tokenizer, Senders(), ElasticConfig(ep_size=2, max_ep_size=6, attention_tp=2))
    assert router._outputs_of({(2, 5), (3, 6), (0, 1), (5, 9)}) == {(1, 5), (0, 1)}
    alone = SglangRouter(tokenizer, Senders(), ElasticConfig(ep_size=2, max_ep_size=6))
    assert alone._outputs_of({(2, 5), (3, 6)}) == {(2, 5), (3, 6)}
