"""The MoE layer on expert columns for Ascend: permute, grouped GEMM, SwiGLU, grouped GEMM, combine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elasticmoe_kernels.ascend.combine import combine
from elasticmoe_kernels.ascend.gather_rows import gather_rows
from elasticmoe_kernels.ascend.grouped_gemm import grouped_gemm
from elasticmoe_kernels.ascend.routing import route
from elasticmoe_kernels.ascend.swiglu import swiglu
from elasticmoe_kernels.ascend.tiles import Tiles, tiles_for
from elasticmoe_kernels.errors import NoBackend, ShapeError

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class Cores:
    """How many programs a launch may have: cube cores for kernels with a matmul, vector cores for the others."""

    cube: int
    vector: int


def cores_of(device: torch.device) -> Cores:
    """The core counts of an NPU, from triton-ascend's driver. Raises NoBackend on any other device."""
    if device.type != "npu":
        raise NoBackend(f"the Ascend kernels run on an NPU, not on {device.type}")
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(device.index)
    return Cores(cube=int(properties["num_aicore"]), vector=int(properties["num_vectorcore"]))


def moe_experts(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_slots: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    cores: Cores | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Sum over k of weight * expert(slot, x[t]); see `elasticmoe_kernels.registry.moe_experts` for the contract.

    Args:
        x: [T, H] bfloat16, float16 or float32, rows contiguous.
        w13: [S, 2I, H], dim 0 with any pitch; w2: [S, H, I], likewise. Unmapped slots are never touched.
        topk_slots: [T, K] integer, -1 = not here. topk_weights: [T, K] float32.
        cores, tiles: taken from the device and the shape when left out.

    Returns: [T, H] in x's dtype.
    """
    tokens, hidden = x.shape
    top_k, num_slots = topk_slots.shape[1], w13.shape[0]
    cores = cores or cores_of(x.device)
    rows = tokens * top_k
    out = torch.empty_like(x)
    if not rows:
        return out.zero_()
    tiles = tiles or tiles_for(rows, num_slots, x.element_size())
    tiles.check(x.element_size())
    routing = route(topk_slots, num_slots)
    permuted = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    gather_rows[(min(cores.vector, rows),)](
        x, routing.token, permuted, rows, tokens, hidden, x.stride(0), hidden, BLOCK_H=tiles.block_h
    )
    y = expert_mlp(permuted, w13, w2, routing.offsets, routing.slots, cores=cores, tiles=tiles)
    weights = topk_weights.to(torch.float32).contiguous()
    combine[(min(cores.vector, tokens),)](
        y, routing.row, weights, out, tokens, hidden, hidden, out.stride(0), TOP_K=top_k, BLOCK_H=tiles.block_h
    )
    return out


def expert_mlp(
    rows: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    offsets: torch.Tensor,
    slots: torch.Tensor,
    *,
    cores: Cores | None = None,
    tiles: Tiles | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """w2 @ (silu(gate) * up) for rows that lie expert by expert already, as SGLang's NPU dispatchers leave them.

    Args:
        rows: [R, H], contiguous.
        offsets: [G + 1] int32: group g owns rows [offsets[g], offsets[g + 1]).
        slots: [G] int32: where group g's weights are, -1 = not on this rank.
        out: [R, H] to write to; rows of absent groups keep what it holds. Fresh and undefined there when left out.

    Returns: [R, H].
    """
    count = rows.shape[0]
    double, inter, groups = w13.shape[1], w2.shape[2], slots.shape[0]
    cores = cores or cores_of(rows.device)
    tiles = tiles or tiles_for(count, groups, rows.element_size())
    _check(rows, w13, w2)
    gate_up = torch.empty(count, double, dtype=rows.dtype, device=rows.device)
    activated = torch.empty(count, inter, dtype=rows.dtype, device=rows.device)
    out = torch.empty_like(rows) if out is None else out
    for source, weight, target in ((rows, w13, gate_up), (activated, w2, out)):
        if source is activated:
            swiglu[(min(cores.vector, max(count, 1)),)](
                gate_up, activated, offsets, groups, inter, double, inter, BLOCK_I=tiles.block_i
            )
        grouped_gemm[(cores.cube,)](
            source,
            weight,
            target,
            offsets,
            slots,
            groups,
            weight.shape[1],
            weight.shape[2],
            source.stride(0),
            weight.stride(0),
            target.stride(0),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
        )
    return out


def _check(rows: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> None:
    hidden, inter = rows.shape[1], w2.shape[2]
    if (
        w13.shape[1:] != (2 * inter, hidden)
        or w2.shape[1] != hidden
        or w13.dtype != rows.dtype
        or w2.dtype != rows.dtype
    ):
        raise ShapeError(f"rows {_of(rows)}, w13 {_of(w13)} and w2 {_of(w2)} do not belong together")
    for name, weight in (("w13", w13), ("w2", w2)):
        if weight.stride()[1:] != (weight.shape[2], 1):
            raise ShapeError(f"{name} must be contiguous within a slot, its strides are {weight.stride()}")
    # Row offsets are 32 bit in the kernels; only a slot's offset needs 64.
    if rows.shape[0] * max(2 * inter, hidden) > _INT32_MAX:
        raise ShapeError(
            f"{rows.shape[0]} rows of {max(2 * inter, hidden)} elements are more than 2^31; split the batch"
        )


def _of(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
