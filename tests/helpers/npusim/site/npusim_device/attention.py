"""Attention operators of torch_npu and of ATB, in plain torch on the host.

ATB's operators live in a library of their own that needs libatb, which no wheel ships; they are replaced by name. Their
arguments are those of SGLang's calls, and there is no schema or Meta kernel to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from npusim_device.dispatch import CHECKED, count, note_address, to_host
from npusim_device.operators import halves, rms


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal_from: int | None = None) -> Tensor:
    """q [T, H, D], k [S, G, D], v [S, G, E] -> [T, H, E]. causal_from: position of q's first row in k; None: all."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1).float(), v.repeat_interleave(groups, 1).float()
    scores = torch.einsum("thd,shd->hts", q.float(), k) * scale
    if causal_from is not None:
        places = torch.arange(q.shape[0])[:, None] + causal_from
        scores = scores.masked_fill(torch.arange(k.shape[0])[None, :] > places, float("-inf"))
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v).to(q.dtype)


def paged(cache: Tensor, table: Tensor, tokens: int, heads: int) -> Tensor:
    """The first `tokens` rows of a request: cache [pages, page, ...], table of its pages -> [tokens, heads, D]."""
    page = cache.shape[1]
    rows = cache[table[: (tokens + page - 1) // page].long()]
    return rows.reshape(-1, heads, rows[0, 0].numel() // heads)[:tokens]


def _flat_pages(cache: Tensor, block_size: int) -> Tensor:
    """[pages, heads, page, D] or [pages, page, heads, D] -> [pages, page, heads * D]."""
    if cache.dim() != 4:
        return cache
    return (cache if cache.shape[1] == block_size else cache.transpose(1, 2)).flatten(2)


def fused_infer_attention_score(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    actual_seq_lengths: Any = None,
    actual_seq_lengths_kv: Any = None,
    block_table: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    block_size: int = 0,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    """Layouts TND, BSND and BSND_NBSD over pages, and TND without. sparse_mode 3 is causal."""
    heads = num_key_value_heads or num_heads
    query = q if query_rope is None else torch.cat((q, query_rope), -1)
    lse = torch.empty(0)

    def causal(offset: int) -> int | None:
        return offset if sparse_mode == 3 else None

    def request(number: int, tokens: int) -> tuple[Tensor, Tensor]:
        assert block_table is not None
        keys = paged(_flat_pages(k, block_size), block_table[number], tokens, heads)
        values = paged(_flat_pages(v, block_size), block_table[number], tokens, heads)
        if key_rope is not None:
            keys = torch.cat((keys, paged(_flat_pages(key_rope, block_size), block_table[number], tokens, heads)), -1)
        return keys, values

    if input_layout == "TND":
        width = v.shape[-1] // (heads if v.dim() == 3 and block_table is not None else 1)
        out, at, kv_at = q.new_zeros(*q.shape[:2], width), 0, 0
        for number, end in enumerate(actual_seq_lengths):
            if block_table is None:
                kv_end = int(actual_seq_lengths_kv[number])
                keys, values = k[kv_at:kv_end], v[kv_at:kv_end]
                keys = keys if key_rope is None else torch.cat((keys, key_rope[kv_at:kv_end]), -1)
                kv_at = kv_end
            else:
                keys, values = request(number, int(actual_seq_lengths_kv[number]))
            out[at:end] = attend(query[at:end], keys, values, scale, causal(len(keys) - (end - at)))
            at = end
        return out, lse
    if input_layout in ("BSND", "BSND_NBSD") and block_table is not None:
        out = q.new_zeros(*q.shape[:3], v.shape[-1] if v.dim() == 4 else v.shape[-1] // heads)
        for number in range(q.shape[0]):
            tokens = int(actual_seq_lengths_kv[number])
            if tokens:
                keys, values = request(number, tokens)
                out[number] = attend(query[number], keys, values, scale, causal(tokens - q.shape[1]))
        return out, lse
    raise NotImplementedError(f"npusim: npu_fused_infer_attention_score with layout {input_layout}")


def fused_infer_attention_score_v2(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    names = {
        "actual_seq_qlen": "actual_seq_lengths",
        "actual_seq_kvlen": "actual_seq_lengths_kv",
        "num_query_heads": "num_heads",
        "softmax_scale": "scale",
    }
    return fused_infer_attention_score(q, k, v, **{names.get(name, name): value for name, value in options.items()})


def kv_rmsnorm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    **_options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cache_mode not in ("PA", "PA_BNSD"):
        raise NotImplementedError(f"npusim: npu_kv_rmsnorm_rope_cache with cache_mode {cache_mode}")
    rank = gamma.numel()
    latent, _ = rms(kv[..., :rank], gamma, epsilon)
    values = kv[..., rank:].float()
    values = torch.cat((values[..., ::2], values[..., 1::2]), -1)
    key = (values * cos.float() + halves(values) * sin.float()).to(kv.dtype)
    places = index.flatten().long()
    here = places >= 0
    k_cache.view(-1, key.shape[-1])[places[here]] = key.reshape(-1, key.shape[-1])[here].to(k_cache.dtype)
    ckv_cache.view(-1, rank)[places[here]] = latent.reshape(-1, rank)[here].to(ckv_cache.dtype)
    return k_cache, ckv_cache, key, latent


OPERATORS: dict[str, Callable[..., Any]] = {
    "npu_fused_infer_attention_score": fused_infer_attention_score,
    "npu_fused_infer_attention_score_v2": fused_infer_attention_score_v2,
    "npu_kv_rmsnorm_rope_cache": kv_rmsnorm_rope_cache,
}


# ATB


def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor) -> None:
    assert slot_indices.dtype == torch.int32, "ATB takes int32 slots"
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *cache.shape[2:])[slot_indices.long()] = rows.reshape(-1, *cache.shape[2:])


def _lengths(*tensors: Tensor) -> Iterable[tuple[int, ...]]:
    return zip(*(tensor.tolist() for tensor in tensors), strict=True)


def flash_attention_qlens(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    mask: Tensor,
    block_table: Tensor,
    seq_len: Tensor,
    context_lens: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    at = 0
    for number, (tokens, context) in enumerate(_lengths(seq_len, context_lens)):
        keys, values = (paged(cache, block_table[number], context, num_kv_heads) for cache in (key_cache, value_cache))
        rows = query[at : at + tokens].view(tokens, num_heads, -1)
        out[at : at + tokens] = attend(rows, keys, values, scale_value, context - tokens).reshape(tokens, -1)
        at += tokens


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
) -> None:
    for number, context in enumerate(context_lens.tolist()[: query.shape[0]]):
        if context:
            keys, values = (
                paged(cache, block_table[number], context, num_kv_heads) for cache in (key_cache, value_cache)
            )
            out[number : number + 1] = attend(query[number : number + 1], keys, values, scale_value)


def paged_attention_mla(
    query: Tensor,
    key_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    mla_vheadsize: int,
    out: Tensor,
) -> None:
    for number, context in enumerate(context_lens.tolist()[: query.shape[0]]):
        if context:
            keys = paged(key_cache, block_table[number], context, num_kv_heads)
            out[number : number + 1] = attend(query[number : number + 1], keys, keys[..., :mla_vheadsize], scale_value)


def ring_mla(
    q_nope: Tensor,
    q_rope: Tensor,
    k_nope: Tensor,
    k_rope: Tensor,
    value: Tensor,
    mask: Tensor | None,
    seqlen: Tensor,
    head_num: int,
    kv_head_num: int,
    pre_out: Tensor | None = None,
    prev_lse: Tensor | None = None,
    qk_scale: float = 1.0,
    kernel_type: str | None = None,
    mask_type: str | None = None,
    input_layout: str | None = None,
    calc_type: str | None = None,
    output: Tensor | None = None,
    softmax_lse: Tensor | None = None,
) -> None:
    """A block of keys at a time: "calc_type_default" merges into what `output` and `softmax_lse` hold."""
    assert output is not None and softmax_lse is not None
    query, keys = torch.cat((q_nope, q_rope), -1).float(), torch.cat((k_nope, k_rope), -1).float()
    groups = head_num // kv_head_num
    q_lengths, kv_lengths = (seqlen, seqlen) if seqlen.dim() == 1 else seqlen
    at = kv_at = 0
    for rows, columns in _lengths(q_lengths, kv_lengths):
        q_end, kv_end = at + rows, kv_at + columns
        if columns:
            block = keys[kv_at:kv_end].repeat_interleave(groups, 1)
            scores = torch.einsum("thd,shd->hts", query[at:q_end], block) * qk_scale
            if mask_type == "mask_type_triu":
                scores = scores.masked_fill(torch.ones(rows, columns).triu(1 + columns - rows).bool(), float("-inf"))
            lse = scores.logsumexp(-1)
            values = value[kv_at:kv_end].float().repeat_interleave(groups, 1)
            made = torch.einsum("hts,shd->thd", (scores - lse[..., None]).exp(), values)
            if calc_type == "calc_type_default":
                old = softmax_lse[:, at:q_end]
                both = torch.logaddexp(old, lse)
                made = made * (lse - both).exp().t()[..., None]
                made = made + output[at:q_end].float() * (old - both).exp().t()[..., None]
                lse = both
            output[at:q_end] = made.to(output.dtype)
            softmax_lse[:, at:q_end] = lse
        at, kv_at = q_end, kv_end


_CACHES = {"key_cache", "value_cache"}


def install_atb() -> None:
    """Put them where SGLang finds ATB's."""
    import torch_npu

    for owner, name, function in (
        (torch_npu, "_npu_reshape_and_cache", reshape_and_cache),
        (torch_npu, "_npu_flash_attention_qlens", flash_attention_qlens),
        (torch_npu, "_npu_paged_attention", paged_attention),
        (torch_npu, "_npu_paged_attention_mla", paged_attention_mla),
        (torch_npu.atb, "npu_ring_mla", ring_mla),
    ):
        setattr(owner, name, _in_place(f"atb::{name}", function))


def _in_place(name: str, function: Callable[..., None]) -> Callable[..., None]:
    CHECKED[name] = "no schema: ATB is not in the wheel"

    def run(*arguments: Any, **options: Any) -> None:
        count(name)
        for cache in _CACHES & options.keys():
            note_address(f"{name}.{cache}", options[cache])
        host = to_host((arguments, options), name)
        function(*host[0], **host[1])

    return run
