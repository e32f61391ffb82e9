"""Tuning: every candidate of both products separately, then the whole layer with the best of each family."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moe_cases import Layer, Model, families, fits
from moe_timing import Inputs, Timer

from elasticmoe_kernels.triton.config import CONFIG_DIR, GemmConfig, MoePlan, plan_for, tuned_entries
from elasticmoe_kernels.triton.gemm_down import gemm_down_direct, gemm_down_sorted
from elasticmoe_kernels.triton.gemm_swiglu import gemm_swiglu_direct, gemm_swiglu_sorted
from elasticmoe_kernels.triton.quantize import quantize
from elasticmoe_kernels.triton.route import route


class Products:
    """The two products of one family by themselves, on the inputs of one point."""

    def __init__(self, inputs: Inputs, block_m: int, *, direct: bool, quantize_first: bool) -> None:
        self.inputs, self.direct = inputs, direct
        model, slots = inputs.model, inputs.model.experts
        self.routings = [
            route(ids, inputs.table, num_slots=slots, mapped_slots=inputs.local, block_m=block_m) for ids in inputs.ids
        ]
        rows = inputs.tokens * model.top_k if direct else self.routings[0].capacity_blocks * block_m
        self.x, self.x_scale = quantize(inputs.x) if quantize_first else (inputs.x, None)
        self.h = torch.randn(rows, model.inter, device="cuda", dtype=inputs.x.dtype)
        self.h_fp8 = self.h.to(torch.float8_e4m3fn) if quantize_first else None
        self.h_scale = torch.rand(rows, model.inter // 128, device="cuda") if quantize_first else None
        self.y = torch.empty(rows, model.hidden, device="cuda", dtype=inputs.x.dtype)

    def _h(self, quantized: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (self.h_fp8, self.h_scale) if quantized and self.h_fp8 is not None else (self.h, None)

    def up(self, i: int, config: GemmConfig) -> None:
        p, layer = self.inputs, self.inputs.layers[i]
        h, h_scale = self._h(config.block_n == 128)
        if self.direct:
            gemm_swiglu_direct(
                self.x, self.x_scale, layer.w13, layer.w13_scale, p.ids[i], p.table, h, h_scale, config, pdl=True
            )
        else:
            gemm_swiglu_sorted(
                self.x, self.x_scale, layer.w13, layer.w13_scale, self.routings[i], p.model.top_k, h, h_scale, config,
                pdl=True,
            )  # fmt: skip

    def down(self, i: int, config: GemmConfig, quantized: bool) -> None:
        p, layer = self.inputs, self.inputs.layers[i]
        h, h_scale = self._h(quantized)
        if self.direct:
            gemm_down_direct(h, h_scale, layer.w2, layer.w2_scale, p.ids[i], p.table, self.y, config, pdl=True)
        else:
            gemm_down_sorted(h, h_scale, layer.w2, layer.w2_scale, self.routings[i], self.y, config, pdl=True)


def tune_point(timer: Timer, model: Model, layers: list[Layer], tokens: int, share: int) -> dict[str, Any]:
    """Best plan for one size: the products by themselves first, then the whole layer of each family's best."""
    inputs = Inputs(model, layers, tokens, share, "uniform")
    best: tuple[float, MoePlan] | None = None
    tried: list[dict[str, Any]] = []
    turns = range(len(inputs.ids))

    def fastest(name: str, candidates: list[GemmConfig], run_one: Callable[[int, GemmConfig], None]) -> GemmConfig:
        timed = []
        for c in candidates:
            try:
                us = timer([functools.partial(run_one, i, c) for i in turns], target_ms=1.5, samples=3)
            except Exception as e:  # a candidate that cannot run is a line in the record, not the end of the tuning
                tried.append({"op": name, "config": str(c), "failed": f"{type(e).__name__}: {e}"[:200]})
                continue
            timed.append((us, c))
            tried.append({"op": name, "config": str(c), "us": us})
        return min(timed, key=lambda t: t[0])[1]

    for direct, quantize_first, first, second in families(model, tokens):
        products = Products(inputs, first[0].block_m, direct=direct, quantize_first=quantize_first)
        kind = f"{'direct' if direct else 'sorted'}{' quantized' if quantize_first else ''} {first[0].block_m}"
        first = [c for c in first if fits(c, model, down=False, quantize_first=quantize_first)]
        second = [c for c in second if fits(c, model, down=True, quantize_first=quantize_first)]
        w13 = fastest(f"w13 {kind}", first, products.up)
        quantized = quantize_first and w13.block_n == 128
        w2 = fastest(f"w2 {kind}", second, functools.partial(products.down, quantized=quantized))
        plan = MoePlan(direct=direct, w13=w13, w2=w2, quantize_first=quantize_first)
        us = timer(inputs.ours(plan), target_ms=2, samples=3)
        tried.append({"op": f"layer {kind}", "us": us})
        if best is None or us < best[0]:
            best = (us, plan)
    assert best is not None, (model.name, tokens, share)
    return {"tokens": tokens, "share": 1 / share, "us": best[0], "plan": best[1].to_json(), "tried": tried}


def install(tuned: dict[str, list[dict[str, Any]]], directory: Path = CONFIG_DIR) -> None:
    """Write what tuning found to where `plan_for` looks."""
    for name, entries in tuned.items():
        kept = [{k: e[k] for k in ("tokens", "share", "plan")} for e in entries]
        text = ",\n  ".join(json.dumps(e) for e in kept)
        (directory / f"{name}.json").write_text(f'{{"device": "NVIDIA H200", "entries": [\n  {text}\n]}}\n')
    tuned_entries.cache_clear()
    plan_for.cache_clear()
