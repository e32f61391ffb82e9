"""MoE on expert columns for CPU.

Rows are grouped by slot (one stable sort), each group is one matrix product with the slot's own matrix, and each
token's results are summed in float32 in the order of k. Only slots that a token names are ever read: a column that is
not mapped is address space without memory, and a single load from it would kill the process.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from elasticmoe_kernels.cpu import fp8

# One pass holds at most this many (token, k) rows, so that a long prefill needs a bounded scratch.
MAX_ROWS_PER_PASS = 32768
# oneDNN's half-precision product costs about 20 us a call before it computes. Below this many elements, widening the
# matrix to float32 and using MKL takes a third of that (measured, AVX512_BF16 without AMX: 2I x H = 128 x 128, 1 row:
# 7 us against 22 us; at 512 x 512 it is the other way round: 81 us against 47 us).
WIDEN_BELOW_ELEMENTS = 1 << 16
# Up to this many weight elements (pairs x 2I x H), gathering the matrices of all pairs and one batched product beat a
# product for each expert (8 pairs, float32: 18 us against 46 at 2I x H = 64 x 64; no gain from 128 x 128 on).
GATHER_BELOW_ELEMENTS = 1 << 16
# Up to this many tokens the combine is two calls over [T, K, H]; above, K calls over [T, H] need less memory.
SMALL_COMBINE_TOKENS = 32

_Index = npt.NDArray[np.int64]
_Scales = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Biases:
    """Of experts with a clamped SwiGLU: w13 float32 [S, 2I], w2 [S, H], and gpt-oss's alpha and limit."""

    w13: torch.Tensor
    w2: torch.Tensor
    alpha: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class Groups:
    """(token, k) pairs in the order of their slots.

    order: [R] flat index t * K + k of each row, sorted by slot, then by token and k. Rows of slot -1 are left out.
    slots: the slots that have rows, ascending. sizes: how many rows each of them has.
    """

    order: _Index
    slots: list[int]
    sizes: list[int]


def group_by_slot(topk_slots: torch.Tensor, num_slots: int) -> Groups:
    """Sort the pairs of `topk_slots` [T, K] (int32 or int64, on CPU) by slot; stable, -1 dropped."""
    flat = topk_slots.numpy().reshape(-1)
    # numpy sorts 16-bit keys by radix; every other width by merging, ten times slower on long prefills.
    keys = flat.astype(np.int16) if num_slots < 2**15 else flat
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    first = int(np.searchsorted(sorted_keys, 0))
    order, sorted_keys = order[first:], sorted_keys[first:]
    rows_of = np.bincount(sorted_keys, minlength=1)
    slots = rows_of.nonzero()[0]
    return Groups(order=order, slots=slots.tolist(), sizes=rows_of[slots].tolist())


def moe_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_slots: torch.Tensor,
    topk_weights: torch.Tensor,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    clamped: tuple[float, float] | None = None,
) -> torch.Tensor:
    """See `registry.moe_experts`; returns x's dtype. Inference only: no gradient is recorded.

    float32, float64: computed in that type. bfloat16, float16: products in that type with float32 accumulation (or
    wholly in float32 for small experts), SwiGLU in float32, combine in float32. e4m3 weights are dequantised and
    everything is computed in float32 (float64 for float64), activations are not quantised: `fp8.product`.
    """
    scales = (w13_scale, w2_scale)
    biases = None
    if w13_bias is not None and w2_bias is not None and clamped is not None:
        biases = Biases(w13=w13_bias, w2=w2_bias, alpha=clamped[0], limit=clamped[1])
    with torch.no_grad():
        tokens, k = topk_slots.shape
        per_pass = max(1, MAX_ROWS_PER_PASS // max(k, 1))
        if tokens <= per_pass:
            return _one_pass(x, w13, w2, topk_slots, topk_weights, scales, biases)
        out = torch.empty_like(x)
        for start in range(0, tokens, per_pass):
            part = slice(start, start + per_pass)
            out[part] = _one_pass(x[part], w13, w2, topk_slots[part], topk_weights[part], scales, biases)
        return out


def _one_pass(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_slots: torch.Tensor,
    topk_weights: torch.Tensor,
    scales: _Scales,
    biases: Biases | None,
) -> torch.Tensor:
    k = topk_slots.shape[1]
    order: _Index
    if scales[0] is None and topk_slots.numel() * w13.shape[1] * w13.shape[2] <= GATHER_BELOW_ELEMENTS:
        order = np.flatnonzero(topk_slots.numpy() >= 0)
        groups = None
    else:
        groups = group_by_slot(topk_slots, w13.shape[0])
        order = groups.order
    if not len(order):
        return torch.zeros_like(x)
    index = torch.from_numpy(order)
    rows = x.index_select(0, torch.from_numpy(order // k))
    if groups is None:
        y = _gathered_experts(rows, w13, w2, topk_slots.reshape(-1).index_select(0, index), biases)
    else:
        y = _experts(rows, w13, w2, groups, scales, biases)
    return _combine(y, order, topk_slots, topk_weights, x.dtype)


def _gathered_experts(
    rows: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, slots: torch.Tensor, biases: Biases | None
) -> torch.Tensor:
    """[R, H] and one slot a row -> [R + 1, H] like `_experts`, with one batched product a projection."""
    inter = w2.shape[2]
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    gate_up = torch.bmm(w13.index_select(0, slots).to(wide), rows.to(wide).unsqueeze(2)).squeeze(2)
    if biases is None:
        activated = F.silu(gate_up[:, :inter]).mul_(gate_up[:, inter:])
    else:
        gate_up += biases.w13.index_select(0, slots)
        activated = _clamped(gate_up, biases)
    y = activated.new_empty(rows.shape[0] + 1, w2.shape[1])
    y[-1].zero_()
    torch.bmm(w2.index_select(0, slots).to(wide), activated.unsqueeze(2), out=y[:-1].unsqueeze(2))
    if biases is not None:
        y[:-1] += biases.w2.index_select(0, slots)
    return y


def _experts(
    rows: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, groups: Groups, scales: _Scales, biases: Biases | None
) -> torch.Tensor:
    """[R, H] in slot order -> [R + 1, H], the last row zero (what absent pairs read in the combine)."""
    inter = w2.shape[2]
    half = rows.dtype in (torch.bfloat16, torch.float16)
    widen = half and (scales[0] is not None or w13.shape[1] * w13.shape[2] <= WIDEN_BELOW_ELEMENTS)
    if widen:
        rows = rows.float()
    gate_up = rows.new_empty(rows.shape[0], 2 * inter)
    _products(rows, w13, gate_up, groups, widen, scales[0])
    if biases is None:
        gate, up = gate_up[:, :inter], gate_up[:, inter:]
        activated = F.silu(gate.float() if half and not widen else gate).mul_(up).to(rows.dtype)
    else:
        gate_up = _plus_bias(gate_up, biases.w13, groups)
        activated = _clamped(gate_up, biases).to(rows.dtype)
    y = rows.new_empty(rows.shape[0] + 1, w2.shape[1])
    y[-1].zero_()
    _products(activated, w2, y[:-1], groups, widen, scales[1])
    if biases is not None:
        y[:-1] = _plus_bias(y[:-1], biases.w2, groups)
    return y


def _plus_bias(rows: torch.Tensor, bias: torch.Tensor, groups: Groups) -> torch.Tensor:
    """[R, N] in slot order plus each row's bias [S, N], in float32 (float64 for float64); only slots with rows are
    read."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    sizes = torch.tensor(groups.sizes)
    return wide + bias.index_select(0, torch.tensor(groups.slots)).repeat_interleave(sizes, 0)


def _clamped(gate_up: torch.Tensor, biases: Biases) -> torch.Tensor:
    """gpt-oss's SwiGLU of [R, 2I] -> [R, I]; overwrites its input."""
    inter = gate_up.shape[1] // 2
    gate = gate_up[:, :inter].clamp_(max=biases.limit)
    up = gate_up[:, inter:].clamp_(-biases.limit, biases.limit)
    return torch.sigmoid(gate * biases.alpha).mul_(gate).mul_(up + 1)


def _products(
    a: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    groups: Groups,
    widen: bool,
    scale: torch.Tensor | None,
) -> None:
    """out[rows of slot] = a[rows of slot] @ weight[slot].T, slot by slot.

    `mm` with `out` on slices made by one `split` each: 5 us less a slot than `out[a:b] = F.linear(...)`.
    """
    mm, split = torch.mm, torch.split_with_sizes
    for slot, rows, result in zip(groups.slots, split(a, groups.sizes), split(out, groups.sizes), strict=True):
        matrix = weight[slot]
        if scale is not None:
            fp8.product(rows, matrix, scale[slot], result)
            continue
        mm(rows, (matrix.float() if widen else matrix).t(), out=result)


def _combine(
    y: torch.Tensor, order: _Index, topk_slots: torch.Tensor, topk_weights: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Weighted sum over k, one term after the other, in float32 (float64 for float64).

    The order never depends on the slots, so ranks that each hold some of the experts differ from one rank that holds
    all of them only by where the partial sums are cut.
    """
    tokens, k = topk_slots.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    present = len(order)
    if present == tokens * k:
        where = np.empty(tokens * k, dtype=np.int64)
        weights = topk_weights.to(wide)
    else:
        where = np.full(tokens * k, present, dtype=np.int64)
        weights = torch.where(topk_slots >= 0, topk_weights, 0).to(wide)
    where[order] = np.arange(present)
    row_of = torch.from_numpy(where)
    if tokens <= SMALL_COMBINE_TOKENS:
        terms = y.index_select(0, row_of).view(tokens, k, -1).to(wide).mul_(weights[:, :, None])
        return terms.sum(1).to(dtype)
    row_of = row_of.view(tokens, k)
    out = y.index_select(0, row_of[:, 0]).to(wide).mul_(weights[:, :1])
    for i in range(1, k):
        out.add_(y.index_select(0, row_of[:, i]).to(wide).mul_(weights[:, i : i + 1]))
    return out.to(dtype)
