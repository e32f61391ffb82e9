"""Which requests of a batch are attended to in one call, and that call. Raw tensors only.

A plan is made once per forward pass and used by every layer. Requests of similar size share one padded call of
``scaled_dot_product_attention``; padding never costs more than about twice the useful work, because requests that
differ more are put into different groups, by powers of two. So the number of calls a layer grows with the logarithm of
the longest request, not with the batch.

A decode step is an extension by one token: query ``i`` of a request with ``prefix`` cached tokens sees the cache
positions ``0 ... prefix + i``, or of a layer with a sliding window the last ``window + 1`` of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

# Scores a padded call may add before splitting pays: below it the call's fixed cost (tens of microseconds) dominates.
_FREE_PADDING = 4096
_SHORTEST_BUCKET = 64


@dataclass(frozen=True, kw_only=True)
class Group:
    """Requests that share one call: `requests` of them, each padded to `queries` new and `keys` cached tokens."""

    requests: int
    queries: int
    keys: int
    query_rows: torch.Tensor | slice
    """Rows of q, request-major; int64 [requests * queries], or a slice where they lie together."""
    kv_rows: torch.Tensor
    """Rows of the KV pool, request-major; int64 [requests * keys]. Padding repeats the request's first row."""
    mask: torch.Tensor | None
    """Added to the scores, [requests, 1, queries, keys], 0 or -inf. None where `causal` says it all."""
    causal: bool
    """True: hidden are exactly the keys after the query, both counted from 0."""
    valid: torch.Tensor | None
    """int64 indices into requests * queries of the queries that are not padding; None when all are."""


def plan(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    prefix_lens: Sequence[int],
    extend_lens: Sequence[int],
    dtype: torch.dtype,
    window: int | None = None,
) -> list[Group]:
    """Groups that cover every request once.

    Args:
        req_to_token: int [max requests, max context], KV row of each position of each request.
        req_pool_indices: int [batch], the row of `req_to_token` of each request.
        prefix_lens / extend_lens: tokens that are cached already / new; the new ones' queries follow each other in q,
            their keys are in the pool by the time the plan is used.
        dtype: of the queries, for the mask.
        window: how many keys before its own a query sees; None: all. Keys that no query of a request sees are left out.
    """
    first_keys = [0 if window is None else max(0, length - window) for length in prefix_lens]
    starts = [0]
    for length in extend_lens:
        starts.append(starts[-1] + length)
    members = [i for i, length in enumerate(extend_lens) if length > 0]
    cached = [length - first for length, first in zip(prefix_lens, first_keys, strict=True)]
    return [
        _group(req_to_token, req_pool_indices, ids, starts, first_keys, cached, extend_lens, dtype, window)
        for ids in _partition(members, cached, extend_lens)
    ]


def _partition(members: list[int], prefix_lens: Sequence[int], extend_lens: Sequence[int]) -> list[list[int]]:
    if not members:
        return []
    totals = {i: prefix_lens[i] + extend_lens[i] for i in members}
    padded = len(members) * max(extend_lens[i] for i in members) * max(totals.values())
    if padded <= 2 * sum(extend_lens[i] * totals[i] for i in members) + _FREE_PADDING:
        return [members]
    buckets: dict[tuple[int, int], list[int]] = {}
    for i in members:
        key = ((extend_lens[i] - 1).bit_length(), (max(totals[i], _SHORTEST_BUCKET) - 1).bit_length())
        buckets.setdefault(key, []).append(i)
    return list(buckets.values())


def _group(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    ids: list[int],
    starts: list[int],
    first_keys: Sequence[int],
    cached: Sequence[int],
    extend_lens: Sequence[int],
    dtype: torch.dtype,
    window: int | None,
) -> Group:
    """first_keys: position of the first key of each request; cached: those from there on that are cached."""
    extends = [extend_lens[i] for i in ids]
    prefixes = [cached[i] for i in ids]
    firsts = [first_keys[i] for i in ids]
    totals = [p + e for p, e in zip(prefixes, extends, strict=True)]
    queries, keys = max(extends), max(totals)
    pool_rows = req_pool_indices if len(ids) == len(req_pool_indices) else req_pool_indices[ids]
    position = torch.arange(keys)
    if max(firsts) == 0:
        kv_rows = req_to_token[pool_rows, :keys].to(torch.int64)
    else:
        # Past a request's end the last column repeats; what it names is replaced below.
        columns = (torch.tensor(firsts).unsqueeze(1) + position).clamp_(max=req_to_token.shape[1] - 1)
        kv_rows = req_to_token[pool_rows.unsqueeze(1), columns].to(torch.int64)
    if min(totals) < keys:
        # Whatever stands past a request's end in the table may belong to somebody else; its own first row is always
        # written and finite, so that a hidden key's weight of exactly 0 times its value is 0.
        kv_rows = torch.where(position < torch.tensor(totals).unsqueeze(1), kv_rows, kv_rows[:, :1])
    together = all(b == a + 1 for a, b in itertools.pairwise(ids)) and min(extends) == queries
    offset = torch.arange(queries)
    if together:
        query_rows: torch.Tensor | slice = slice(starts[ids[0]], starts[ids[-1] + 1])
        valid = None
    else:
        length = torch.tensor(extends).unsqueeze(1)
        first = torch.tensor([starts[i] for i in ids]).unsqueeze(1)
        query_rows = (first + torch.minimum(offset, length - 1)).flatten()
        valid = None if min(extends) == queries else (offset < length).flatten().nonzero().flatten()
    cut = window is not None and max(totals) > window + 1  # some query does not see the request's first key
    causal = max(totals) == min(totals) and max(prefixes) == 0 and queries > 1 and not cut
    mask = None
    if not causal and not (queries == 1 and min(totals) == keys):
        last_visible = torch.tensor(prefixes)[:, None, None, None] + offset[:, None]
        mask = torch.zeros((len(ids), 1, queries, keys), dtype=dtype)
        mask.masked_fill_(position > last_visible, float("-inf"))
        if window is not None and cut:
            mask.masked_fill_(position < last_visible - window, float("-inf"))
    return Group(
        requests=len(ids),
        queries=queries,
        keys=keys,
        query_rows=query_rows,
        kv_rows=kv_rows.flatten(),
        mask=mask,
        causal=causal,
        valid=valid,
    )


def attend(
    group: Group,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of the group's queries, written to their rows of `out`.

    Args:
        q: [tokens, heads, width].
        keys: KV pool [rows, kv heads, width]; heads is a multiple of kv heads.
        values: KV pool [rows, kv heads, value width], or None for a latent pool, where the first value-width columns of
            a key are its value (absorbed MLA).
        out: [tokens, heads, value width].
        sinks: [heads], one more score for each query of a head, of a key whose value is zero. Not with a latent pool.
    """
    shape = (group.requests, group.queries)
    heads, kv_heads = q.shape[1], keys.shape[1]
    query = q[group.query_rows].view(*shape, heads, -1)
    # In decode, heads that share keys become rows of one small matrix product: no key is repeated or read twice.
    folded = (group.requests, kv_heads, heads // kv_heads, -1)
    query = query.view(folded) if group.queries == 1 else query.transpose(1, 2)
    key = keys.index_select(0, group.kv_rows).view(group.requests, group.keys, kv_heads, -1).transpose(1, 2)
    if values is None:
        # The fused kernel wants one width for keys and values; the surplus columns are dropped below.
        value = key
    else:
        value = values.index_select(0, group.kv_rows).view(group.requests, group.keys, kv_heads, -1).transpose(1, 2)
    if sinks is None:
        result = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=group.mask,
            is_causal=group.causal,
            scale=scale,
            enable_gqa=query.shape[1] != kv_heads,
        )
    else:
        result = _with_sinks(query, key, value, group, scale, sinks)
    result = result[..., : out.shape[2]]
    if group.queries > 1:
        result = result.transpose(1, 2)
    flat = result.reshape(-1, heads, out.shape[2])
    if isinstance(group.query_rows, slice):
        out[group.query_rows] = flat
    elif group.valid is None:
        out.index_copy_(0, group.query_rows, flat)
    else:
        out.index_copy_(0, group.query_rows[group.valid], flat[group.valid])


def _with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group, scale: float, sinks: torch.Tensor
) -> torch.Tensor:
    """Attention as if every query saw one more key, with the score of its head's sink and a value of zero.

    That divides by exp(sink) more: softmax's result is multiplied by its denominator over the larger one, whose
    logarithm the kernel knows.

    Args:
        query: [requests, heads, queries, width], or in decode [requests, kv heads, heads of each, width].
        key, value: [requests, kv heads, keys, width]. sinks: [heads].
    """
    kv_heads = key.shape[1]
    if query.shape[1] != kv_heads:
        each = query.shape[1] // kv_heads
        key, value = key.repeat_interleave(each, 1), value.repeat_interleave(each, 1)
    result, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, group.causal, attn_mask=group.mask, scale=scale
    )
    sink = sinks.to(log_sum.dtype).view(kv_heads, -1) if group.queries == 1 else sinks.to(log_sum.dtype).unsqueeze(1)
    weighed: torch.Tensor = result * torch.sigmoid(log_sum - sink).unsqueeze(-1)
    return weighed.to(query.dtype)
