"""Which waiting requests go on without a prefill, and that no request is lost on the way. What becomes of their tokens:
tests/e2e/test_scale_tokens.py, with real servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe_patches.worker.decode_again import decode_again
from elasticmoe_patches.worker.requests import ahead_of_new_ones

pytestmark = pytest.mark.process

ROW = 3


class Batch(SimpleNamespace):
    """What of a ScheduleBatch matters here."""

    def is_empty(self) -> bool:
        return not self.reqs

    def merge_batch(self, other: Batch) -> None:
        self.reqs = self.reqs + other.reqs


def batch(reqs: list[Any], **other: Any) -> Any:
    lengths = torch.tensor([20 for _ in reqs])
    return Batch(
        **{
            "reqs": reqs,
            "sampling_info": SimpleNamespace(penalizer_orchestrator=SimpleNamespace(is_required=False)),
            "extend_lens": [1 for _ in reqs],
            "out_cache_loc": torch.arange(len(reqs)),
            "seq_lens": lengths,
            "seq_lens_cpu": lengths,
            "orig_seq_lens": lengths,
            "seq_lens_sum": 20 * len(reqs),
            "input_ids": None,
            "prefill_input_ids_cpu": torch.zeros(len(reqs)),
            "req_pool_indices": torch.full((len(reqs),), ROW),
            "device": "cpu",
            **other,
        }
    )


def request(rid: str, output: tuple[int, ...] = ()) -> Any:
    kv = SimpleNamespace(kv_allocated_len=20, kv_committed_len=20)
    return SimpleNamespace(rid=rid, output_ids=list(output), seqlen=20, kv=kv)


class Scheduler:
    """Has one prompt waiting that is new, and two requests that moved here, one of them with its KV."""

    def __init__(self, **batch_has: Any) -> None:
        self.waiting_queue = [request("new")]
        for rid, with_kv in (("with KV", True), ("without", False)):
            self.waiting_queue.append(request(rid, (7, 8)))
            ahead_of_new_ones(self, rid, with_kv=with_kv)
        self.batch_has = batch_has
        self.chunked_req = None
        self.is_mixed_chunk = self.enable_overlap = False
        self.freed: list[int] = []
        self.next_tokens: dict[int, int] = {}
        self.token_to_kv_pool_allocator = SimpleNamespace(free=lambda rows: self.freed.extend(rows.tolist()))
        self.future_map = SimpleNamespace(
            stash_bonus_tokens=lambda rows, last: self.next_tokens.update(
                zip(rows.tolist(), last.tolist(), strict=True)
            )
        )
        self.running_batch = batch([])

    def new_batch(self, _: Any, running: Any) -> Any:
        """Admits all that wait."""
        admitted, self.waiting_queue = self.waiting_queue, []
        return SimpleNamespace(batch_to_run=batch(admitted, **self.batch_has), running_batch=running)

    def plan(self, running: Any) -> Any:
        return decode_again(self, running, self.new_batch)

    @property
    def waiting(self) -> list[str]:
        return [req.rid for req in self.waiting_queue]


def rids(found: Any) -> list[str]:
    return [req.rid for req in found.reqs]


def test_a_request_with_its_kv_joins_those_that_decode() -> None:
    scheduler = Scheduler()
    plan = scheduler.plan(batch([request("running")]))
    assert plan.batch_to_run is None and rids(plan.running_batch) == ["running", "with KV"]
    assert scheduler.waiting == ["without", "new"]
    moved = plan.running_batch.reqs[-1]
    assert (moved.kv.kv_allocated_len, moved.kv.kv_committed_len) == (19, 19)
    assert scheduler.freed == [0] and scheduler.next_tokens == {ROW: 8}


def test_where_nothing_ran_it_is_in_the_scheduler_at_once() -> None:
    """A rank that dies in the next collective must find it somewhere."""
    scheduler = Scheduler()
    plan = scheduler.plan(scheduler.running_batch)
    assert plan.running_batch is scheduler.running_batch and rids(scheduler.running_batch) == ["with KV"]
    assert scheduler.running_batch.seq_lens.tolist() == [19] and scheduler.running_batch.out_cache_loc is None


@pytest.mark.parametrize(
    "needs",
    [
        {"sampling_info": SimpleNamespace(penalizer_orchestrator=SimpleNamespace(is_required=True))},
        {"extend_lens": [4]},
    ],
)
def test_what_needs_a_prefill_gets_one_alone(needs: dict[str, Any]) -> None:
    scheduler = Scheduler(**needs)
    plan = scheduler.plan(batch([request("running")]))
    assert rids(plan.batch_to_run) == ["with KV"] and rids(plan.running_batch) == ["running"]
    assert scheduler.waiting == ["without", "new"] and scheduler.freed == []


@pytest.mark.parametrize("busy", [{"chunked_req": request("chunked")}, {"is_mixed_chunk": True}])
def test_a_prompt_in_chunks_goes_on_first(busy: dict[str, Any]) -> None:
    scheduler = Scheduler()
    vars(scheduler).update(busy)
    assert scheduler.plan(batch([])) is None
    assert scheduler.waiting == ["with KV", "without", "new"]


def test_a_full_rank_admits_none_and_loses_none() -> None:
    scheduler = Scheduler()
    running = batch([request("running")])
    plan = decode_again(scheduler, running, lambda _, now: SimpleNamespace(batch_to_run=None, running_batch=now))
    assert plan.batch_to_run is None and plan.running_batch is running
    assert scheduler.waiting == ["with KV", "without", "new"]
