"""What the scheduler does for the rank's KV cache: takes over a capacity, says how much is in use, copies requests' KV.

Called at the top of an iteration, and by a survivor that waits for the others after a rank's death.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from elasticmoe_sglang.worker.kv import Resized, copy_tokens

logger = logging.getLogger(__name__)


def run_kv_jobs(scheduler: Any, worker: Any) -> None:
    """Carry out what the agent asks for."""
    from elasticmoe_patches.worker.kv_resize import resize
    from elasticmoe_patches.worker.recovery import set_aside  # which calls this module itself

    kv = worker.kv
    if kv is None:
        return

    def move(rows: torch.Tensor, targets: torch.Tensor) -> None:
        copy_tokens(kv.rows, targets, kv.rows, rows)

    def retract() -> int:
        scheduler.cur_batch_for_debug = None  # it was carried out whole
        return set_aside(scheduler, worker)

    def apply_commit(tokens: int) -> Resized:
        done = resize(scheduler, tokens, move, retract)
        logger.info(
            "rank %d: %d KV tokens (%d evicted, %d moved, %d requests retracted)",
            worker.rank,
            done.tokens,
            done.evicted,
            done.moved,
            done.retracted,
        )
        return done

    kv.jobs.run(apply_commit)
    publish_use(scheduler, worker)


def publish_use(scheduler: Any, worker: Any) -> None:
    """On the control page, for the status."""
    allocator = scheduler.token_to_kv_pool_allocator
    cached = 0 if scheduler.disable_radix_cache else scheduler.tree_cache.evictable_size()
    used = allocator.size - allocator.available_size() - cached
    worker.region.control.set_kv(worker.rank, capacity=allocator.size, used=used, cached=cached)


def announce_first(scheduler: Any, worker: Any) -> None:
    """Before the first iteration: limits that SGLang took from the address space are those of what is mapped."""
    from elasticmoe_patches.worker.kv_resize import announce

    if worker.kv is not None:
        announce(scheduler, scheduler.token_to_kv_pool_allocator.size)
        publish_use(scheduler, worker)


def pages_of(scheduler: Any, req: Any, tokens: int) -> list[int]:
    """The pages that hold a request's first `tokens` tokens, in their order."""
    page = scheduler.page_size
    row = scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :tokens:page]
    pages: list[int] = (row // page).tolist()
    return pages


def fetch(worker: Any, scheduler: Any, window_rows: Any, pages: Sequence[int], first: int, rows: torch.Tensor) -> None:
    """Copy a retiring rank's tokens `first`, `first` + 1, ... of the request that has `pages` there to `rows` here."""
    page = scheduler.page_size
    position = torch.arange(first, first + len(rows), device=rows.device)
    there = torch.tensor(pages, dtype=torch.int64, device=rows.device)[position // page] * page + position % page
    copy_tokens(worker.kv.rows, rows, window_rows, there)
