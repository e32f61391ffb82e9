"""Requests whose KV is here but for their last token's go on decoding, without a prefill of that one token.

Those are requests that have moved here with their KV, and those that were put back after another rank's death. A
prefill of one token each would take a step of its own, which on a GPU is computed without a graph, and in which nobody
else's stream goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from elasticmoe_patches.worker.requests import lacks_one_token

logger = logging.getLogger(__name__)


def decode_again(scheduler: Any, running_batch: Any, new_batch: Callable[[Any, Any], Any]) -> Any | None:
    """Put them into the running batch.

    Args:
        new_batch: SGLang's `get_new_batch_prefill(scheduler, running_batch)`: admits requests of the waiting queue, and
            allocates what they need.

    Returns:
        SGLang's plan. It has nothing to prefill, so that the running batch decodes next, or it has these requests'
        prefill, where one of them needs it (penalties, which count the tokens that a decode step begins with;
        log-probabilities of the prompt; KV that was evicted meanwhile). None: no such request waits, or a chunked
        prompt goes on first.
    """
    ready = [req for req in scheduler.waiting_queue if lacks_one_token(req)]
    if not ready or scheduler.chunked_req is not None or scheduler.is_mixed_chunk:
        return None
    others = [req for req in scheduler.waiting_queue if not lacks_one_token(req)]
    scheduler.waiting_queue = ready
    try:
        plan = new_batch(scheduler, running_batch)
    finally:
        scheduler.waiting_queue += others
    batch = plan.batch_to_run
    if batch is None or not _can_decode(batch):
        return plan
    _undo_prefill(scheduler, batch)
    logger.info("%d requests that came with their KV decode again", len(batch.reqs))
    running = plan.running_batch
    if running.is_empty():
        running = batch
        # A rank's death in the exchange of batch sizes, before SGLang has seen this plan, must not lose them.
        scheduler.running_batch = batch
    else:
        running.merge_batch(batch)
    plan.batch_to_run, plan.running_batch = None, running
    return plan


def _can_decode(batch: Any) -> bool:
    penalties = batch.sampling_info.penalizer_orchestrator.is_required
    return not penalties and all(length == 1 for length in batch.extend_lens)


def _undo_prefill(scheduler: Any, batch: Any) -> None:
    """From a batch that is ready to prefill one token each, to one whose next decode step computes these tokens."""
    allocator = scheduler.token_to_kv_pool_allocator
    allocator.free(batch.out_cache_loc)  # the decode step allocates
    batch.out_cache_loc = None
    for req in batch.reqs:
        req.kv.kv_allocated_len -= 1
        req.kv.kv_committed_len -= 1
    batch.seq_lens = batch.seq_lens - 1
    batch.seq_lens_cpu = batch.seq_lens_cpu - 1
    batch.orig_seq_lens = batch.orig_seq_lens - 1
    batch.seq_lens_sum = None
    # The next step's input comes from where the last step's results are kept.
    batch.input_ids = batch.prefill_input_ids_cpu = None
    if scheduler.enable_overlap:
        # A finished request's row may still be written by a step in flight.
        scheduler.schedule_stream.wait_stream(scheduler.forward_stream)
    last = torch.tensor([req.output_ids[-1] for req in batch.reqs], dtype=torch.int64, device=batch.device)
    scheduler.future_map.stash_bonus_tokens(batch.req_pool_indices, last)
