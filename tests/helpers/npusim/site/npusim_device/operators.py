"""Operators of torch_npu that SGLang's NPU path calls outside attention, in plain torch on the host.

What each computes follows CANN's description and SGLang's use of it: it was not compared with an NPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.helpers import npu_ops


def rms(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x normalised over its last dimension, in x's dtype, and the reciprocal of the norm in float32."""
    values = x.float()
    rstd = torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)
    return (values * rstd * gamma.float()).to(x.dtype), rstd


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return rms(x, gamma, epsilon)


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    x = x1 + x2
    return (*rms(x, gamma, epsilon), x)


def gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    values, experts = torch.topk(x.float().softmax(-1), k, dim=-1)
    rows = torch.arange(x.shape[0] * k, dtype=torch.int32).view(k, -1).t().contiguous()
    return values.to(x.dtype), experts.to(torch.int32), rows


def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    **unused: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm_type: 0 softmax, 1 sigmoid. group_select_mode: 0 the group's best score, 1 the sum of its two best."""
    assert not any(value is not None for value in unused.values()), unused
    scores = x.float().softmax(-1) if norm_type == 0 else x.float().sigmoid()
    chosen = scores if bias is None else scores + bias.float()
    if group_count > 1:
        grouped = chosen.view(chosen.shape[0], group_count, -1)
        best = grouped.topk(2, -1)[0].sum(-1) if group_select_mode == 1 else grouped.max(-1)[0]
        keep = torch.zeros_like(best).scatter_(1, best.topk(k_group, -1)[1], 1).bool()
        chosen = grouped.masked_fill(~keep[..., None], float("-inf")).reshape(chosen.shape)
    experts = chosen.topk(k, -1)[1]
    weights = scores.gather(1, experts)
    if norm_type == 1 or renorm:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    return (weights * routed_scaling_factor).to(x.dtype), experts.to(torch.int32), scores


def scatter_nd_update_(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    x[tuple(indices.long().unbind(-1))] = updates
    return x


def halves(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a), with a and b the halves of the last dimension."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None) -> Tensor:
    values = x.float()
    if rotary_mode == "half":
        turned = halves(values)
    else:
        turned = torch.stack((-values[..., 1::2], values[..., ::2]), -1).flatten(-2)
    return (values * r1.float() + turned * r2.float()).to(x.dtype)


def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours in, halves out."""
    values = x.float()
    values = torch.cat((values[..., ::2], values[..., 1::2]), -1)
    return (values * cos.float() + halves(values) * sin.float()).to(x.dtype)


def mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cache: Tensor,
    head_size: int,
    *,
    mrope_section: list[int] | None = None,
    rotary_mode: str = "half",
    cache_mode: str = "default",
) -> tuple[Tensor, Tensor]:
    cos, sin = cache.index_select(0, positions.flatten().long()).float()[:, None].chunk(2, -1)
    width = cache.shape[-1]

    def turn(heads: Tensor) -> Tensor:
        values = heads.float().view(heads.shape[0], -1, head_size)
        turned, rest = values[..., :width], values[..., width:]
        if rotary_mode == "half":
            first, second = turned.chunk(2, -1)
            turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
        else:
            first, second = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
        return torch.cat((turned, rest), -1).reshape(heads.shape).to(heads.dtype)

    return turn(query), turn(key)


def top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    out = logits.clone().float()
    for row, values in enumerate(out):
        ordered, places = values.sort(descending=True)
        keep = torch.ones_like(ordered, dtype=torch.bool)
        if k is not None:
            keep &= torch.arange(ordered.numel()) < int(k[row])
        if p is not None:
            shares = ordered.masked_fill(~keep, float("-inf")).softmax(-1)
            keep &= (shares.cumsum(-1) - shares) < float(p[row])
        out[row, places[~keep]] = float("-inf")
    return out.to(logits.dtype)


def transpose_batchmatmul(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    perm_x1: list[int] | None = None,
    perm_x2: list[int] | None = None,
    perm_y: list[int] | None = None,
    batch_split_factor: int = 1,
) -> Tensor:
    assert bias is None and scale is None
    left, right = x.permute(perm_x1 or (0, 1, 2)), weight.permute(perm_x2 or (0, 1, 2))
    return (left.float() @ right.float()).to(x.dtype).permute(perm_y or (1, 0, 2)).contiguous()


def finalize_routing(rows: Tensor, *arguments: Any, **options: Any) -> Tensor:
    names = ("skip1", "skip2", "bias", "scales", "src_to_dst", "expert_idx", "drop_pad_mode", "k")
    schema = {"expanded_src_to_dst_row": "src_to_dst", "export_for_source_row": "expert_idx"}
    given = dict(zip(names, arguments, strict=False)) | {
        schema.get(name, name): value for name, value in options.items()
    }
    return npu_ops.finalize_routing(rows, **given)


def format_cast(x: Tensor, acl_format: int, **_options: Any) -> Tensor:
    return x


def prefetch(*_arguments: Any, **_options: Any) -> None:
    return None


OPERATORS: dict[str, Callable[..., Any]] = {
    "npu_rms_norm": rms_norm,
    "npu_add_rms_norm": add_rms_norm,
    "npu_swiglu": npu_ops.swiglu,
    "npu_moe_gating_top_k_softmax": gating_top_k_softmax,
    "npu_moe_gating_top_k": gating_top_k,
    "npu_moe_init_routing_v2": npu_ops.init_routing,
    "npu_moe_finalize_routing": finalize_routing,
    "npu_grouped_matmul": npu_ops.grouped_matmul,
    "npu_scatter_nd_update_": scatter_nd_update_,
    "npu_format_cast": format_cast,
    "npu_rotary_mul": rotary_mul,
    "npu_interleave_rope": interleave_rope,
    "npu_mrope": mrope,
    "npu_top_k_top_p": top_k_top_p,
    "npu_transpose_batchmatmul": transpose_batchmatmul,
    "npu_prefetch": prefetch,
}
