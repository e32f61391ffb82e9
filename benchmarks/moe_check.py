"""Errors of the layer against float64 on fresh inputs, with poisoned memory and with unmapped slots."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from moe_cases import Layer, Model
from moe_timing import Inputs

from elasticmoe_kernels.reference.moe import moe_experts as reference_moe
from elasticmoe_kernels.reference.moe import moe_experts_fp8 as reference_moe_fp8
from elasticmoe_kernels.triton.config import GemmConfig, MoePlan, default_plan
from elasticmoe_kernels.triton.moe import fused_moe

# Relative 2-norm error against float64 that each weight dtype allows. fp8: against the reference whose activations
# pass through e4m3 as well; rounding h to bf16 first flips some of its e4m3 values.
LIMITS = {"bf16": 6e-3, "fp16": 1.5e-3, "fp8": 3e-2}


def poison() -> None:
    """Fill the allocator's free memory with NaN, so that scratch that is read before it is written shows."""
    blocks = [torch.full((1 << 28,), float("nan"), device="cuda") for _ in range(2)]
    blocks += [torch.full((n,), float("nan"), device="cuda") for n in (1 << 10, 1 << 14, 1 << 18, 1 << 20) * 8]
    del blocks


def error_of(model: Model, layer: Layer, tokens: int, share: int, kind: str, plan: MoePlan | None, seed: int,
             half: bool = False) -> float:  # fmt: skip
    """Relative error of our layer on up to 16 sampled rows against float64; NaN if anything was left unwritten."""
    torch.manual_seed(seed)
    inputs = Inputs(model, [layer], tokens, share, kind)
    slots = inputs.local_ids[0]
    x = inputs.x.half() if half else inputs.x
    poison()
    out = torch.full_like(x, float("nan"))
    fused_moe(
        x, layer.w13, layer.w2, inputs.ids[0], inputs.weights, slot_table=inputs.table, mapped_slots=inputs.local,
        w13_scale=layer.w13_scale, w2_scale=layer.w2_scale, out=out, plan=plan,
    )  # fmt: skip
    if not bool(out.isfinite().all()):
        return math.nan
    sample = torch.randperm(tokens, device="cuda")[:16]
    return relative(out, sample, reference(model, layer, x[sample], slots[sample], inputs.weights[sample]))


def reference(model: Model, layer: Layer, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Float64; with fp8 weights the activations pass through e4m3 as the kernels have it."""
    if model.fp8:
        assert layer.w13_scale is not None and layer.w2_scale is not None
        return reference_moe_fp8(x, layer.w13, layer.w2, layer.w13_scale, layer.w2_scale, slots, weights)
    return reference_moe(x, layer.w13, layer.w2, slots, weights)


def relative(out: object, sample: torch.Tensor, wanted: torch.Tensor) -> float:
    """2-norm of the error over that of the wanted rows; NaN if any element of `out` is not finite."""
    assert isinstance(out, torch.Tensor)
    if not bool(out.isfinite().all()):
        return math.nan
    difference, norm = float((out[sample].double() - wanted).norm()), float(wanted.norm())
    return difference / norm if norm else difference


def unmapped_slots() -> dict[str, float]:
    """Errors with most slots reserved but unmapped (driver VMM): touching one would end the process."""
    from cuda.bindings import driver as cu

    def ok(result: Any) -> Any:
        assert result[0] == cu.CUresult.CUDA_SUCCESS, result[0]
        return result[1] if len(result) == 2 else None

    prop = cu.CUmemAllocationProp()
    prop.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    access = cu.CUmemAccessDesc()
    access.location = prop.location
    access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    h, i, slots, pitch = 512, 256, 32, 2 << 20
    va = ok(cu.cuMemAddressReserve(slots * pitch, 0, 0, 0))
    mapped = [3, 4, 17, 30]
    for slot in mapped:
        handle = ok(cu.cuMemCreate(pitch, prop, 0))
        ok(cu.cuMemMap(int(va) + slot * pitch, pitch, 0, handle, 0))
        ok(cu.cuMemSetAccess(int(va) + slot * pitch, pitch, [access], 1))
    storage = torch._C._construct_storage_from_data_pointer(int(va), torch.device("cuda", 0), slots * pitch)
    step = pitch // 2
    memory = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    w13 = memory.set_(storage, 0, (slots, 2 * i, h), (step, h, 1))
    w2 = torch.empty(0, dtype=torch.bfloat16, device="cuda").set_(storage, 2 * i * h, (slots, h, i), (step, i, 1))
    for slot in mapped:
        w13[slot] = torch.randn(2 * i, h, device="cuda") / h**0.5
        w2[slot] = torch.randn(h, i, device="cuda") / i**0.5
    small = GemmConfig(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=3)
    large = GemmConfig(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=3, tma=True)
    swapped = replace(small, tma=True, swap_ab=True)
    found = {}
    for name, tokens, plan in (
        ("direct", 9, MoePlan(direct=True, w13=small, w2=small)),
        ("direct tma swap", 9, MoePlan(direct=True, w13=swapped, w2=swapped)),
        ("sorted", 200, MoePlan(direct=False, w13=small, w2=small)),
        ("sorted tma", 200, MoePlan(direct=False, w13=large, w2=replace(large, tma_rows=True))),
        ("sorted one-dot", 200, MoePlan(direct=False, w13=replace(large, one_dot=True, persistent=True), w2=large)),
    ):  # fmt: skip
        ids = torch.tensor([*mapped, -1], device="cuda")[torch.rand(tokens, 5, device="cuda").topk(3).indices].int()
        x = torch.randn(tokens, h, device="cuda", dtype=torch.bfloat16)
        weights = torch.rand(tokens, 3, device="cuda")
        out = fused_moe(x, w13, w2, ids, weights, mapped_slots=len(mapped), plan=plan)
        wanted = reference_moe(x, w13, w2, ids, weights)
        found[name] = float((out.double() - wanted).norm() / wanted.norm())
    return found


def check(model: Model, layer: Layer, results: list[dict[str, Any]]) -> None:
    """Errors of chosen and default plans, over sizes, shares and routings, on fresh inputs; fp16 for bf16's shapes."""

    def add(dtype: str, tokens: int, share: int, kind: str, plan: str, value: float) -> None:
        results.append({
            "model": model.name, "dtype": dtype, "tokens": tokens, "share": share, "routing": kind, "plan": plan,
            "error": value, "limit": LIMITS[dtype], "ok": value <= LIMITS[dtype],
        })  # fmt: skip

    dtype = "fp8" if model.fp8 else "bf16"
    for seed, tokens in enumerate((1, 17, 300)):
        default = default_plan(tokens, model.top_k, model.experts, fp8=model.fp8)
        for share in (1, 8):
            for kind in ("uniform", "skewed"):
                add(dtype, tokens, share, kind, "chosen", error_of(model, layer, tokens, share, kind, None, seed))
                add(dtype, tokens, share, kind, "default", error_of(model, layer, tokens, share, kind, default, seed))
    if model.fp8:
        return
    halved = Layer(w13=layer.w13.half(), w2=layer.w2.half(), w13_scale=None, w2_scale=None, contiguous=layer.contiguous)
    for tokens in (1, 17, 300):
        value = error_of(model, halved, tokens, 1, "uniform", None, tokens, half=True)
        add("fp16", tokens, 1, "uniform", "chosen", value)
