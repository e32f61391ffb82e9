"""Moving a running request from a retiring rank to a survivor.

The retiring rank sends the request as its client sent it, what has been generated and streamed so far, and the numbers
of the pages of its HMM memory that hold the KV of its tokens. The survivor lets SGLang build the request anew, restores
the progress before it enters the waiting queue, copies the pages and inserts them into its radix cache: the request
then lacks one token and decodes (`decode_again`); with pages of several tokens a prefill computes those of the last
page. Where the KV cannot be inserted (radix cache off, pool full) a prefill recomputes it; the result is the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from elasticmoe_patches.versions import api
from elasticmoe_patches.worker.requests import ORIGIN, live_requests, pages_of
from elasticmoe_sglang.worker.kv import Rows, copy_tokens

_CARRIED = (
    # what the client's side has received, so that no token is sent twice and none is missing
    "send_token_offset",
    "send_decode_id_offset",
    "send_output_token_logprobs_offset",
    "input_logprob_sent",
    "logprob",
    "hidden_states",
    "sampling_mask_rows",
    "customized_info",
    # what is reported about the request
    "reasoning_tokens",
    "_is_reasoning_over",
    "_think_end_match_len",
    "cached_tokens",
    "cached_tokens_device",
    "cached_tokens_host",
    "cached_tokens_storage",
    "_cache_breakdown_computed",
    "retraction_count",
    "weight_version_events",
    "spec_verify_ct",
)
"""Attributes of SGLang's Req that migrate unchanged. Scheduling state is rebuilt, as after SGLang's own retraction
(`Req.reset_for_retract`)."""

ACCEPTED = "elasticmoe_accepted"
"""Attribute of a Req that a rank's waiting queue has accepted: no limit of the queue refuses it any more."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a request has come. Travels inside SGLang's own wrapper between two of its schedulers."""

    output_ids: tuple[int, ...]
    carried: dict[str, Any]
    aborted: bool
    unseen_logprobs: int = 0
    """Leading output tokens whose log-probabilities the client has and this Progress has not (after a rank's death)."""
    sent_again: bool = False
    """From the journal, which has the tokens only: what SGLang counts of them has to be counted again."""

    def apply(self, req: Any) -> None:
        """Restore into a freshly built Req, before it enters the waiting queue."""
        req.output_ids = array("q", self.output_ids)
        for name, value in self.carried.items():
            setattr(req, name, value)
        if req.return_logprob and self.unseen_logprobs:
            _fill_logprobs(req.logprob, self.output_ids[: self.unseen_logprobs])
        if self.output_ids:
            req.is_retracted = True
            req.retracted_stain = True
            if req.grammar is not None:
                for token in self.output_ids:
                    req.grammar.accept_token(token)


def _fill_logprobs(logprob: Any, tokens: tuple[int, ...]) -> None:
    """Entries that are never sent again, so that later ones stand at their token's index.

    The prompt's were sent with the first token. SGLang would compute them again over prompt and output, and fail an
    assertion that counts them; with lists, though empty, they are done, as after a retraction.
    """
    for name in ("input_token_logprobs", "input_top_logprobs", "input_token_ids_logprobs"):
        for part in ("val", "idx"):
            setattr(logprob, f"{name}_{part}", [])
    logprob.output_token_logprobs_val = [0.0] * len(tokens)
    logprob.output_token_logprobs_idx = list(tokens)
    for name in ("output_top_logprobs", "output_token_ids_logprobs"):
        for part in ("val", "idx"):
            setattr(logprob, f"{name}_{part}", [None] * len(tokens))


@dataclass(frozen=True, kw_only=True)
class MigratedRequest:
    """One migrating request: SGLang's message, its progress, and the pages of HMM memory that hold its KV."""

    request: Any
    progress: Progress
    kv_tokens: int
    pages: list[int] = field(default_factory=list)


def progress_of(req: Any) -> Progress:
    return Progress(
        output_ids=tuple(req.output_ids),
        carried={name: getattr(req, name) for name in _CARRIED},
        aborted=req.to_finish is not None,
    )


def migrated_requests(scheduler: Any) -> list[MigratedRequest]:
    """What a retiring rank sends, longest first, so that dealing them out in turn balances the survivors' loads."""
    found = []
    for req, tokens in live_requests(scheduler):
        kept = 0 if scheduler.disable_radix_cache else tokens
        found.append(
            MigratedRequest(
                request=getattr(req, ORIGIN),
                progress=progress_of(req),
                kv_tokens=kept,
                pages=pages_of(scheduler, req, kept) if kept else [],
            )
        )
    return sorted(found, key=lambda migrated: -migrated.kv_tokens)


def place_kv(
    scheduler: Any,
    request: Any,
    output_ids: tuple[int, ...],
    tokens: int,
    fill: Callable[[int, Any], None],
) -> bool:
    """Insert a migrated request's KV into the radix cache. False when there is no room or no cache: it is recomputed.

    Args:
        fill: (first, rows) writes the KV of the request's tokens `first`, `first` + 1, ... to these rows of the pool.
    """
    from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    allocator = scheduler.token_to_kv_pool_allocator
    whole = tokens // scheduler.page_size * scheduler.page_size
    if scheduler.disable_radix_cache or whole == 0 or not _make_room(scheduler, allocator, whole):
        return False
    token_ids = (array("q", request.input_ids) + array("q", output_ids))[:whole]
    key = RadixKey(token_ids, request.extra_key, cache_salt=request.cache_salt or None)
    # What this rank has cached of it already stays as it is; only the rest is allocated, filled and inserted.
    cache = scheduler.tree_cache
    known = api().matched_rows(cache, cache.match_prefix(MatchPrefixParams(key=key)))
    if len(known) == whole:
        return True
    fresh = allocator.alloc(whole - len(known))
    if fresh is None:
        return False
    fill(len(known), fresh)
    value = torch.cat([known.to(fresh.dtype), fresh])
    cache.insert(InsertParams(key=key, value=value, prev_prefix_len=len(known)))
    return True


def fill_from_window(
    scheduler: Any, kv_rows: Rows, window_rows: Rows, pages: Sequence[int]
) -> Callable[[int, torch.Tensor], None]:
    """For `place_kv`: copied from a retiring rank's HMM memory, where the request has these pages.

    Args:
        kv_rows, window_rows: `rows` of this rank's KV cache and of the window into the retiring rank's.
    """
    page = scheduler.page_size

    def fill(first: int, rows: torch.Tensor) -> None:
        position = torch.arange(first, first + len(rows), device=rows.device)
        there = torch.tensor(pages, dtype=torch.int64, device=rows.device)[position // page] * page + position % page
        copy_tokens(kv_rows, rows, window_rows, there)

    return fill


def _make_room(scheduler: Any, allocator: Any, tokens: int) -> bool:
    from sglang.srt.mem_cache.base_prefix_cache import EvictParams

    if allocator.available_size() < tokens:
        scheduler.tree_cache.evict(EvictParams(num_tokens=tokens - allocator.available_size()))
    return bool(allocator.available_size() >= tokens)
