"""The requests that SGLang's scheduler has on one rank: finding all of them, and setting them aside.

Called between two batches, or after a batch failed.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from elasticmoe_patches.versions import api
from elasticmoe_sglang.errors import CollectiveError

ORIGIN = "elasticmoe_origin"
"""Attribute of a Req that holds the tokenised request it was built from."""
_LEFT = "elasticmoe_left"
"""Attribute of a Req that was put back or moved here: tokens whose KV has to be computed before its next one."""
# Longer than any request is on its way: what is older was handled by the rank that had the request then.
REMEMBERED_S = 60.0


@dataclass
class IterationInput:
    """What an iteration of the event loop works on, so that nothing is lost when a collective fails in it.

    Attributes:
        pulled: request messages read in this iteration and not yet processed by the scheduler.
        replay: messages of a failed iteration; the next one processes them before what it reads.
        new_batch: the prefill batch that is being put together or run: its requests are in no queue.
        building: the request message from which SGLang is building a Req now.
    """

    pulled: list[Any] = field(default_factory=list)
    replay: list[Any] = field(default_factory=list)
    new_batch: Any = None
    building: Any = None


class RecentAborts:
    """Aborts that may have to reach a request which is on its way between two ranks: it is checked when it arrives.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: deque[tuple[float, str, bool]] = deque()

    def add(self, rid: str | None, everything: bool) -> None:
        """`rid` as SGLang interprets it: all requests whose id begins with it."""
        now = self._clock()
        while self._entries and self._entries[0][0] < now - REMEMBERED_S:
            self._entries.popleft()
        self._entries.append((now, rid or "", everything))

    def clear(self) -> None:
        """What is on its way from here on was sent after every abort so far."""
        self._entries.clear()

    def reaches(self, rid: str) -> bool:
        """Whether a request that arrives now was aborted on its way."""
        since = self._clock() - REMEMBERED_S
        return any(at >= since and (everything or rid.startswith(start)) for at, start, everything in self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def live_requests(scheduler: Any) -> Iterator[tuple[Any, int]]:
    """Every unfinished request, with the number of its tokens whose KV is in the pool. Call after `drain_results`."""
    seen: set[int] = set()
    batches = [scheduler.running_batch, scheduler.last_batch]
    running = [req for batch in batches if batch is not None for req in batch.reqs]
    if scheduler.chunked_req is not None:
        running.append(scheduler.chunked_req)
    for req in running:
        if id(req) not in seen and not req.finished():
            seen.add(id(req))
            committed = req.kv.kv_committed_len if req.kv.holds_kv else 0
            yield req, min(committed, req.seqlen - 1)
    for req in [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]:
        if id(req) not in seen and not req.finished():
            seen.add(id(req))
            yield req, 0


def pages_of(scheduler: Any, req: Any, tokens: int) -> list[int]:
    """The pages that hold a request's first `tokens` tokens, in their order."""
    page = scheduler.page_size
    row = scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :tokens:page]
    pages: list[int] = (row // page).tolist()
    return pages


def drain_results(scheduler: Any) -> None:
    """Process the batch that the overlap schedule has in flight, as SGLang's `pause_generation` does."""
    queue = getattr(scheduler, "result_queue", None)
    while scheduler.enable_overlap and queue:
        batch, result = queue.popleft()
        scheduler.process_batch_result(batch, result)


def set_aside(scheduler: Any, iteration: IterationInput) -> int:
    """Put every started request back into the waiting queue, as SGLang's `pause_generation` does. Returns how many.

    The KV that is known to be whole goes into the radix cache first. The batch that failed may have left its requests
    in any of the places below.
    """
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    # Results of complete forward passes are good; the failed batch never got into the queue. But on a GPU a batch that
    # was launched may have failed since.
    with contextlib.suppress(CollectiveError):
        drain_results(scheduler)
    started = _started(scheduler, iteration.new_batch)
    for req, valid in started:
        _release(scheduler, req, valid)
    scheduler.running_batch = ScheduleBatch(reqs=[], batch_is_full=False)
    scheduler.last_batch = None
    scheduler.cur_batch_for_debug = None
    scheduler.chunked_req = None
    iteration.new_batch = None
    if getattr(scheduler, "result_queue", None):
        scheduler.result_queue.clear()
    waiting, scheduler.waiting_queue = scheduler.waiting_queue, []
    for req, valid in started:
        scheduler._add_request_to_queue(req)
        setattr(req, _LEFT, req.seqlen - valid)
    scheduler.waiting_queue.extend(waiting)
    begun_ones_first(scheduler)
    iteration.replay = [*iteration.pulled, *iteration.replay]
    iteration.pulled = []
    return len(started)


def ahead_of_new_ones(scheduler: Any, rid: str, *, with_kv: bool) -> None:
    """Move a request that was queued last, and whose client has tokens already, before those that have not begun.

    Args:
        with_kv: the KV of its tokens is in the radix cache.
    """
    waiting = scheduler.waiting_queue
    if waiting and waiting[-1].rid == rid and waiting[-1].output_ids:
        setattr(waiting[-1], _LEFT, 1 if with_kv else waiting[-1].seqlen)
        begun_ones_first(scheduler)


def lacks_one_token(req: Any) -> bool:
    """Whether a waiting request was put back or moved here with the KV of all its tokens but the last."""
    return bool(req.output_ids) and getattr(req, _LEFT, 0) == 1


def begun_ones_first(scheduler: Any) -> None:
    """Requests whose clients have tokens come first, of those the ones with fewest tokens to compute: a stream that
    needs next to nothing does not wait behind long prompts that are computed again. The others keep their order."""

    def place(req: Any) -> tuple[bool, int]:
        return not req.output_ids, getattr(req, _LEFT, req.seqlen) if req.output_ids else 0

    scheduler.waiting_queue = sorted(scheduler.waiting_queue, key=place)


def give_up_waiting(scheduler: Any, share: float) -> list[str]:
    """Take requests that have not begun out of the waiting queue, so that about this share of the work here goes.

    They go in turn with those that stay, in the queue's order. Work is prompt tokens and tokens that may still be
    generated; what has begun stays, and counts. So does what a caller sent to this very rank. Returns the ids.
    """
    waiting = scheduler.waiting_queue
    new = {id(req) for req in waiting if _may_go(req)}
    kept = sum(_work(req) for req, _ in live_requests(scheduler) if id(req) not in new)
    given, rids, stay = 0, [], []
    for req in waiting:
        if id(req) not in new:
            stay.append(req)
        elif given * (1 - share) < kept * share:
            given += _work(req)
            rids.append(req.rid)
        else:
            kept += _work(req)
            stay.append(req)
    scheduler.waiting_queue = stay
    return rids


def _may_go(req: Any) -> bool:
    origin = getattr(req, ORIGIN, None)
    return not req.output_ids and not req.kv.holds_kv and origin is not None and origin.routed_dp_rank is None


def _work(req: Any) -> int:
    """Tokens to compute, roughly: of the prompt, unless it was computed, and those to generate."""
    prompt = 0 if req.output_ids else len(req.origin_input_ids)
    return int(prompt + max(1, req.sampling_params.max_new_tokens - len(req.output_ids)))


def _started(scheduler: Any, new_batch: Any) -> list[tuple[Any, int]]:
    """Unfinished requests outside the queues, each with the number of leading tokens whose KV is whole."""
    failed = scheduler.cur_batch_for_debug
    extending = failed is not None and failed.forward_mode is not None and failed.forward_mode.is_extend()
    unsure = {id(req) for req in failed.reqs} if extending else set()
    if new_batch is not None:
        unsure |= {id(req) for req in new_batch.reqs}
    found: list[tuple[Any, int]] = []
    seen = {id(req) for req in scheduler.waiting_queue}
    for batch in (scheduler.running_batch, scheduler.last_batch, failed, new_batch):
        for req in batch.reqs if batch is not None else ():
            if id(req) not in seen and not req.finished():
                seen.add(id(req))
                found.append((req, 0 if id(req) in unsure else req.seqlen - 1))
    chunked = scheduler.chunked_req
    if chunked is not None and id(chunked) not in seen and not chunked.finished():
        found.append((chunked, 0))
    return found


def _release(scheduler: Any, req: Any, valid: int) -> None:
    from sglang.srt.managers.schedule_batch import release_req

    if not req.kv.holds_kv:
        return
    whole = min(valid, req.kv.kv_committed_len)
    if whole > req.kv.cache_protected_len and not scheduler.disable_radix_cache:
        api().insert_request(scheduler.tree_cache, req, whole)
    release_req(
        req=req,
        remaing_req_count=0,
        req_to_token_pool=scheduler.req_to_token_pool,
        token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
        tree_cache=scheduler.tree_cache,
        hisparse_coordinator=scheduler.hisparse_coordinator,
        offload_kv=False,
    )
