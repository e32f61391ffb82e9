"""A rank's KV capacity changes while it serves: SGLang's allocator, radix cache and bookkeeping follow.

Rows are unmapped from the end of the address space. Free rows are given up first. If that is not enough, the least
recently used prefixes are evicted, by SGLang's own eviction; if still more is needed, running requests are put back
into the waiting queue, as by SGLang's retraction. The rest of a prompt that is being prefilled in chunks counts as in
use. What is still in use in rows to be unmapped is moved to free rows below: nothing is given up because of its
address.

Called at the top of a scheduler iteration, when no batch is being put together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from elasticmoe_patches.versions import api
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.worker.kv import Resized

logger = logging.getLogger(__name__)

MoveRows = Callable[[torch.Tensor, torch.Tensor], None]
"""Copies the rows of the first tensor to those of the second; both int64, on the allocator's device."""


def resize(scheduler: Any, tokens: int, move_rows: MoveRows, set_aside: Callable[[], int]) -> Resized:
    """Change the capacity to `tokens` rows, a multiple of the page size. Idempotent.

    Args:
        set_aside: retracts every running request; how many there were.

    Raises:
        WorkerError: a request of this rank needs more than `tokens`; nothing has changed then.
    """
    allocator = scheduler.token_to_kv_pool_allocator
    assert allocator.free_group is None and tokens % allocator.page_size == 0
    if tokens >= allocator.size:
        _grow(allocator, tokens)
        update_limits(scheduler, tokens)
        return Resized(tokens=tokens)
    return _shrink(scheduler, tokens, move_rows, set_aside)


def _grow(allocator: Any, tokens: int) -> None:
    page = allocator.page_size
    new = torch.arange(allocator.size // page + 1, tokens // page + 1, dtype=torch.int64, device=allocator.device)
    allocator.free_pages = torch.cat((allocator.free_pages, new))


def _shrink(scheduler: Any, tokens: int, move_rows: MoveRows, set_aside: Callable[[], int]) -> Resized:
    allocator = scheduler.token_to_kv_pool_allocator
    page = allocator.page_size
    pages, keep = allocator.size // page, tokens // page
    _require_fit(scheduler, tokens)
    scheduler.device_module.synchronize()  # no launched kernel reads or writes rows that move
    owed = _owed_pages(scheduler)
    evicted = _evict(scheduler, (_used_pages(allocator) + owed - keep) * page)
    retracted = 0
    if _used_pages(allocator) + owed > keep:
        retracted = set_aside()
        evicted += _evict(scheduler, (_used_pages(allocator) - keep) * page)
    if _used_pages(allocator) > keep:
        raise WorkerError(f"{_used_pages(allocator) * page} KV tokens are in use, more than the {tokens} wanted")
    allocator.merge_and_sort_free()
    free, _ = torch.sort(allocator.free_pages)
    in_use = torch.ones(pages + 1, dtype=torch.bool, device=allocator.device)
    in_use[free] = False
    moving = in_use[keep + 1 :].nonzero().flatten() + keep + 1
    below = free[free <= keep]
    targets = below[: len(moving)]
    if len(moving):
        holders = list(_holders(scheduler))
        _require_holders(moving, holders, page, pages)
        offsets = torch.arange(page, device=allocator.device)
        move_rows((moving[:, None] * page + offsets).flatten(), (targets[:, None] * page + offsets).flatten())
        new_page = torch.arange(pages + 1, dtype=torch.int64, device=allocator.device)
        new_page[moving] = targets
        for rows in holders:
            # A tensor that is found twice is mapped twice, with the same result: targets map to themselves.
            mapped = new_page[rows.to(torch.int64) // page] * page + rows % page
            rows.copy_(mapped.to(rows.dtype))
    allocator.free_pages = below[len(moving) :]
    update_limits(scheduler, tokens)
    return Resized(tokens=tokens, evicted=evicted, moved=len(moving) * page, retracted=retracted)


def _used_pages(allocator: Any) -> int:
    return int((allocator.size - allocator.available_size()) // allocator.page_size)


def _owed_pages(scheduler: Any) -> int:
    """Pages that a prompt in the middle of its prefill will take. SGLang makes sure that a request fits when it admits
    it; of a later chunk it takes that for granted, and the scheduler ends where there is no room.
    """
    req, page = scheduler.chunked_req, scheduler.token_to_kv_pool_allocator.page_size
    if req is None or req.finished():
        return 0
    held = req.kv.kv_allocated_len if req.kv.holds_kv else 0
    left = max(0, len(req.origin_input_ids) + len(req.output_ids) - held)
    # With mixed chunks running requests get a token with each chunk.
    chunks = -(-left // scheduler.chunked_prefill_size) if scheduler.is_mixed_chunk else 0
    batch = scheduler.running_batch
    running = sum(each is not req for each in batch.reqs) if batch is not None else 0
    return int(-(-left // page) + running * -(-chunks // page))


def _evict(scheduler: Any, tokens: int) -> int:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    cache = scheduler.tree_cache
    if tokens <= 0 or scheduler.disable_radix_cache or not api().keeps_prefixes(cache):
        return 0
    return int(cache.evict(EvictParams(num_tokens=tokens)).num_tokens_evicted)


def _requests(scheduler: Any) -> Iterator[Any]:
    """Every request of this rank, each once."""
    seen: set[int] = set()
    batches = (scheduler.running_batch, scheduler.last_batch)
    queued = [batch for batch, _ in getattr(scheduler, "result_queue", None) or ()]
    parts = [batch.reqs for batch in (*batches, *queued) if batch is not None and batch.reqs]
    chunked = [scheduler.chunked_req] if scheduler.chunked_req is not None else []
    for part in (*parts, chunked, scheduler.waiting_queue, scheduler.grammar_manager.grammar_queue):
        for req in part:
            if id(req) not in seen:
                seen.add(id(req))
                yield req


def _require_fit(scheduler: Any, tokens: int) -> None:
    """A request that could never run again must not be retracted."""
    page = scheduler.token_to_kv_pool_allocator.page_size
    for req in _requests(scheduler):
        if req.finished():
            continue
        needed = len(req.origin_input_ids) + (req.sampling_params.max_new_tokens or 0) + page
        if needed > tokens:
            raise WorkerError(
                f"request {req.rid} may need {needed} KV tokens, a capacity of {tokens} is too small",
                hint="Retry when it has finished, or ask for more ranks",
            )


def _holders(scheduler: Any) -> Iterator[torch.Tensor]:
    """Every tensor of row numbers that outlives an iteration."""
    table = scheduler.req_to_token_pool.req_to_token
    for req in _requests(scheduler):
        if req.kv.holds_kv:
            yield table[req.kv.req_pool_idx, : req.kv.kv_allocated_len]
        prefix = api().prefix_rows(req)
        if prefix is not None:
            yield prefix
    for batch in (scheduler.running_batch, scheduler.last_batch):
        rows = getattr(batch, "out_cache_loc", None)
        if rows is not None:
            yield rows
    if not scheduler.disable_radix_cache and api().keeps_prefixes(scheduler.tree_cache):
        yield from _cached(scheduler.tree_cache)


def _cached(cache: Any) -> Iterator[torch.Tensor]:
    from sglang.srt.mem_cache.unified_cache.component_type import ComponentType

    nodes = list(cache.tree_core.root_node.children.values())
    while nodes:
        node = nodes.pop()
        nodes.extend(node.children.values())
        value = node.component_data[ComponentType.FULL].value
        if value is not None:
            yield value


def _require_holders(moving: torch.Tensor, holders: list[torch.Tensor], page: int, pages: int) -> None:
    known = torch.zeros(pages + 1, dtype=torch.bool, device=moving.device)
    for rows in holders:
        known[rows.to(torch.int64) // page] = True
    lost = moving[~known[moving]]
    if len(lost):
        raise WorkerError(
            f"{len(lost)} pages of KV belong to nothing that can be moved, such as page {int(lost[0])}",
            hint="A feature of SGLang that is not supported holds them; see docs/operations.md",
        )


def update_limits(scheduler: Any, tokens: int) -> None:
    """Update every copy of the capacity that the scheduler keeps."""
    allocator = scheduler.token_to_kv_pool_allocator
    allocator.size = tokens
    if allocator.page_size > 1:
        allocator.num_pages = tokens // allocator.page_size
    allocator.get_kvcache().size = tokens
    runner = scheduler.tp_worker.model_runner
    runner.max_total_num_tokens = tokens
    runner.memory_pool_config.max_total_num_tokens = tokens
    scheduler.max_total_num_tokens = tokens
    # As SGLang computes them from the capacity at its start.
    running = min(runner.max_running_requests, tokens // 2)
    longest = min(scheduler.model_config.context_len, tokens) - 1
    scheduler.max_running_requests = running
    scheduler.max_req_len, scheduler.max_req_input_len = longest, longest - 5
    for part in ("invariant_checker", "pool_stats_observer", "load_inquirer", "kv_events_publisher"):
        holder = getattr(scheduler, part)
        for name, value in (("max_total_num_tokens", tokens), ("max_running_requests", running)):
            if hasattr(holder, name):
                object.__setattr__(holder, name, value)  # some are frozen dataclasses
