"""The input of an iteration that failed: it is reported once, and processed before what arrives later."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches.worker import recovery
from elasticmoe_patches.worker.inbox import MigrationInbox
from elasticmoe_patches.worker.requests import IterationInput, ahead_of_new_ones
from elasticmoe_patches.worker.worker import RecoveryInbox
from elasticmoe_sglang.config import ElasticConfig

pytestmark = pytest.mark.process


class Rank:
    """A worker and the scheduler's ends of its sockets; `arriving` is read one list a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from elasticmoe_patches.srt.managers.scheduler_components import request_receiver

        self.posted: list[Any] = []
        self.arriving: list[list[Any]] = []
        self.worker: Any = SimpleNamespace(
            rank=1,
            iteration=IterationInput(),
            fences=[],
            inbox=MigrationInbox(),
            recovery=RecoveryInbox(),
            peer=SimpleNamespace(getsockopt=lambda option: 0),
            agent=SimpleNamespace(post=self.posted.append),
        )
        self.fences: list[Any] = []
        output = SimpleNamespace(send_output=lambda fence, _: self.fences.append(fence.operation_id))
        self.scheduler = SimpleNamespace(
            request_receiver=SimpleNamespace(_pull_raw_reqs=self.read),
            ipc_channels=SimpleNamespace(send_to_detokenizer=output),
            running_batch=None,
            last_batch=None,
            chunked_req=None,
            waiting_queue=[],
            grammar_manager=SimpleNamespace(grammar_queue=[]),
        )
        self._hook = request_receiver.after_pull_raw_reqs
        monkeypatch.setattr(request_receiver, "current_worker", lambda: self.worker)

    def read(self) -> list[Any]:
        requests = self._hook(self.arriving.pop(0) if self.arriving else [], None)
        assert requests is not None
        return requests


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    return Rank(monkeypatch)


def request(rid: str) -> Any:
    return SimpleNamespace(rid=rid)


def test_everything_up_to_the_fence_is_reported_once_and_replayed_in_its_order(rank: Rank) -> None:
    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq, ElasticResumeReq

    resumed = ElasticResumeReq(
        operation_id="",
        retiring_rank=-1,
        request=request("of the dead rank"),
        progress=None,
        kv_tokens=0,
        kv_pages=[],
    )
    rank.worker.iteration.replay = [request("a"), request("b")]
    fence = ElasticFenceReq(operation_id="op", rank=1)
    rank.arriving = [[request("c")], [resumed], [request("d"), fence], [request("after the fence")]]
    recovery.report(rank.scheduler, rank.worker, "op")
    [answer] = rank.posted
    assert answer.rids == ["a", "b", "c", "d", "of the dead rank"]
    assert rank.fences == ["op"]
    assert [item.rid for item in rank.read()] == ["a", "b", "c", "d", "after the fence"]
    assert rank.worker.iteration.replay == [] and rank.read() == []


def test_what_was_read_is_kept_until_the_iteration_has_processed_it(rank: Rank) -> None:
    rank.arriving = [[request("a")]]
    rank.read()
    assert [item.rid for item in rank.worker.iteration.pulled] == ["a"]


def queued(*entries: tuple[str, int, int]) -> Any:
    """Id, tokens of the prompt, tokens its client has."""
    made = [SimpleNamespace(rid=rid, output_ids=[0] * out, seqlen=prompt + out) for rid, prompt, out in entries]
    return SimpleNamespace(waiting_queue=made)


def order(scheduler: Any) -> list[str]:
    return [req.rid for req in scheduler.waiting_queue]


def test_a_request_that_has_begun_waits_for_those_that_have_begun_only() -> None:
    """Moved to a full rank, a stream once stood still until all new requests there had ended."""
    scheduler = queued(("a", 5, 1), ("b", 9, 0), ("c", 3, 0), ("moved", 9, 2))
    ahead_of_new_ones(scheduler, "moved", with_kv=False)
    assert order(scheduler) == ["a", "moved", "b", "c"]
    scheduler = queued(("a", 5, 0), ("moved", 3, 0))
    ahead_of_new_ones(scheduler, "moved", with_kv=False)
    ahead_of_new_ones(queued(), "moved", with_kv=False)
    assert order(scheduler) == ["a", "moved"], "nobody waits for its next token"


def test_a_stream_that_needs_little_does_not_wait_behind_prompts_that_are_computed_again() -> None:
    """After a loss long prompts of the dead rank's requests once kept a short stream waiting for 6 s."""
    scheduler = queued(("new", 4, 0))
    for rid, prompt, out, with_kv in (
        ("long", 1400, 6, False),
        ("short", 17, 14, False),
        ("with its KV", 1400, 9, True),
        ("longer", 2000, 1, False),
    ):
        scheduler.waiting_queue.append(SimpleNamespace(rid=rid, output_ids=[0] * out, seqlen=prompt + out))
        ahead_of_new_ones(scheduler, rid, with_kv=with_kv)
    assert order(scheduler) == ["with its KV", "short", "long", "longer", "new"]


def test_a_retiring_rank_hands_on_what_was_sent_to_it_with_the_fence(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full rank had given the request up; it was on its way to a rank that joined and was to retire at once."""
    from sglang.srt.managers.io_struct import wrap_as_pickle

    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq, ElasticResumeReq
    from elasticmoe_patches.worker import commit
    from elasticmoe_patches.worker.migration import Progress
    from elasticmoe_patches.worker.worker import RankRetired

    scheduler, worker = rank.scheduler, rank.worker

    def begin(message: Any) -> None:
        req = SimpleNamespace(rid=message.rid, elasticmoe_origin=message, output_ids=[], finished=lambda: False)
        scheduler.waiting_queue.append(req)

    scheduler.request_receiver.unwrap_pickle_wrapper = lambda requests: None
    scheduler.request_receiver._split_work_and_control_reqs = lambda requests: (requests, [])
    scheduler.process_input_requests = lambda requests: [begin(message) for message in requests]
    scheduler.handle_generate_request = begin
    scheduler.enable_overlap, scheduler.disable_radix_cache = False, False
    worker.kv, worker.parking, worker.fault_point = None, True, lambda name: None
    worker.leads, worker.runtime = True, SimpleNamespace(config=ElasticConfig(ep_size=2, max_ep_size=2))
    worker.region = SimpleNamespace(control=SimpleNamespace(alive=lambda member: True))
    sent: dict[int, list[Any]] = {}
    monkeypatch.setattr(commit, "_send", lambda _worker, _operation, dealt: sent.update(dealt))
    monkeypatch.setattr("elasticmoe_patches.worker.migration.progress_of", lambda req: None)
    message = SimpleNamespace(rid="given up", unwrap_pickle_fields=lambda: None)
    progress = wrap_as_pickle(Progress(output_ids=(), carried={}, aborted=False, sent_again=True))
    resumed = ElasticResumeReq(
        operation_id="", retiring_rank=-1, request=message, progress=progress, kv_tokens=0, kv_pages=[]
    )
    rank.arriving = [[request("new"), resumed, ElasticFenceReq(operation_id="op", rank=1)]]
    command: Any = SimpleNamespace(operation_id="op", members=[0], joining=[], retiring=[1])
    with pytest.raises(RankRetired):
        commit._retire(scheduler, worker, command)
    assert sorted(migrated.request.rid for migrated in sent[0]) == ["given up", "new"]
    [retired] = rank.posted
    assert retired.migrated == {0: 2} and rank.fences == ["op"]


def test_a_retiring_rank_that_does_not_lead_its_replica_leaves_at_once(rank: Rank) -> None:
    """The rank that leads it sends the requests, and reads the fence: none comes here."""
    from elasticmoe_patches.worker import commit
    from elasticmoe_patches.worker.worker import RankRetired

    rank.worker.leads, rank.scheduler.enable_overlap = False, False
    command: Any = SimpleNamespace(operation_id="op", members=[0], joining=[], retiring=[0, 1])
    with pytest.raises(RankRetired):
        commit._retire(rank.scheduler, rank.worker, command)
    assert rank.posted == [] and rank.fences == []


def test_who_does_not_lead_a_replica_forgets_a_dead_rank_and_counts_nothing(rank: Rank) -> None:
    """No fence comes here, and the rank that leads the replica reports all its requests."""
    rank.worker.leads = False
    rank.worker.inbox.expect("down", [4])
    rank.worker.inbox.release("down", 4)
    rank.worker.recovery.counts.append(SimpleNamespace(operation_id="op", forget=(4,)))
    recovery.answer_counts(rank.scheduler, rank.worker)
    assert rank.worker.recovery.counts == [] and rank.posted == [] and rank.fences == []
    assert rank.worker.inbox.ready(sent=False) == {}
