"""--max-queued-requests counts requests that arrive, not those that were accepted before and move."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches.srt.managers import scheduler as hooks
from elasticmoe_patches.worker.inbox import MigrationInbox
from elasticmoe_patches.worker.migration import Progress
from elasticmoe_patches.worker.requests import IterationInput

pytestmark = pytest.mark.process


class Request(SimpleNamespace):
    """What of a Req matters here."""


def request(rid: str) -> Any:
    stats = SimpleNamespace(set_wait_queue_entry_time=lambda: None, trace_ctx=SimpleNamespace(abort=lambda **_: None))
    return Request(rid=rid, time_stats=stats, return_logprob=False, grammar=None, output_ids=[])


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """SGLang's scheduler as far as its waiting queue goes, which has room for one request; with our hooks."""
    from sglang.srt.disaggregation.utils import DisaggregationMode
    from sglang.srt.managers import scheduler as module
    from sglang.srt.managers.scheduler import Scheduler

    worker = SimpleNamespace(inbox=MigrationInbox(), iteration=IterationInput())
    monkeypatch.setattr(hooks, "current_worker", lambda: worker)
    monkeypatch.setattr(module, "_make_abort_req", lambda req, finished_reason: (req.rid, finished_reason))
    found: Any = object.__new__(Scheduler)
    found.worker = worker
    found.aborted = []
    output = SimpleNamespace(send_output=lambda message, _req: found.aborted.append(message[0]))
    for name, value in {
        "disaggregation_mode": DisaggregationMode.NULL,
        "max_queued_requests": 1,
        "enable_priority_scheduling": False,
        "abort_on_priority_when_disabled": False,
        "waiting_queue": [],
        "processed_tokens_counter": 0,
        "rust_server": None,
        "ipc_channels": SimpleNamespace(send_to_tokenizer=output),
        "_set_or_validate_priority": lambda _req: True,
        "_release_aborted_request": lambda _req: None,
        "_prefetch_kvcache": lambda _req: None,
    }.items():
        monkeypatch.setattr(found, name, value, raising=False)
    limit = Scheduler._abort_on_queued_limit

    def add(req: Any) -> None:
        hooks.before_add_request_to_queue(found, req)
        Scheduler._add_request_to_queue(found, req)

    monkeypatch.setattr(
        found, "_abort_on_queued_limit", lambda req: hooks.around_queued_limit(limit, found, req), raising=False
    )
    found.add = add
    return found


def test_the_limit_holds_for_requests_that_arrive(scheduler: Any) -> None:
    for rid in ("first", "second"):
        scheduler.add(request(rid))
    assert [req.rid for req in scheduler.waiting_queue] == ["first"]
    assert scheduler.aborted == ["second"]


@pytest.mark.parametrize("tokens", [(), (4, 5)])
def test_a_request_that_moves_here_waits_however_full_the_queue_is(scheduler: Any, tokens: tuple[int, ...]) -> None:
    scheduler.add(request("first"))
    scheduler.worker.inbox.resuming["moved"] = Progress(output_ids=tokens, carried={}, aborted=False)
    scheduler.add(request("moved"))
    assert [req.rid for req in scheduler.waiting_queue] == ["first", "moved"]
    assert scheduler.aborted == []


def test_requests_that_ran_go_back_however_many_they_are(scheduler: Any) -> None:
    """After a rank's death, or because their KV is needed for columns: they were accepted."""
    ran = request("ran")
    scheduler.add(ran)
    scheduler.waiting_queue.clear()
    for req in (request("first"), ran, request("new")):
        scheduler.add(req)
    assert [req.rid for req in scheduler.waiting_queue] == ["first", "ran"]
    assert scheduler.aborted == ["new"]
