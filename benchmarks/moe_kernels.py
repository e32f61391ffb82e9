"""MoE kernels on expert columns against SGLang's fused MoE on one GPU: correctness, tuning, comparison.

    python benchmarks/moe_kernels.py compile PART PARTS        compile every candidate (no GPU needed)
    python benchmarks/moe_kernels.py check --out DIR           errors against float64, unmapped slots
    python benchmarks/moe_kernels.py baseline-warm MODEL       compile the baseline's kernels
    python benchmarks/moe_kernels.py run --out DIR [--tune]    all of it: tune, then compare; writes moe-h200.json
    python benchmarks/moe_kernels.py install FILE.json         write the tuned configs (no GPU needed)
    python benchmarks/moe_kernels.py plot FILE.json FILE.png   draw the curves (no GPU needed)

Times are medians of CUDA graph replays. A graph holds several calls that take turns over layers and routings, so that
weights come from memory and not from L2. Both sides get the same inputs in the same run.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "kernels")]

from moe_cases import (
    MODELS,
    SHARES,
    SKEWED_TOKENS,
    TOKENS,
    TUNED_TOKENS,
    Layer,
    Model,
    families,
    fits,
    make_layers,
    make_routing,
    plans,
)

from elasticmoe_kernels.reference.moe import moe_experts as reference_moe
from elasticmoe_kernels.reference.moe import moe_experts_fp8 as reference_moe_fp8
from elasticmoe_kernels.triton.config import (
    CONFIG_DIR,
    GemmConfig,
    MoePlan,
    default_plan,
    plan_for,
    shape_name,
    tuned_entries,
)
from elasticmoe_kernels.triton.gemm_down import gemm_down_direct, gemm_down_sorted
from elasticmoe_kernels.triton.gemm_swiglu import gemm_swiglu_direct, gemm_swiglu_sorted
from elasticmoe_kernels.triton.moe import fused_moe
from elasticmoe_kernels.triton.quantize import quantize
from elasticmoe_kernels.triton.route import route

START = time.monotonic()
BRIEF_TOKENS = (1, 8, 16, 64, 256, 1024, 4096, 16384)
TUNED_SHARES = (1, 8)
"""EP 2 takes the plans of EP 1: as many rows an expert, half the experts."""
# Relative 2-norm error against float64 that each weight dtype allows. fp8: against the reference whose activations
# pass through e4m3 as well; rounding h to bf16 first flips some of its e4m3 values.
LIMITS = {"bf16": 6e-3, "fp16": 1.5e-3, "fp8": 3e-2}


def say(*words: object) -> None:
    print(f"[{time.monotonic() - START:6.1f}s]", *words, flush=True)


class Timer:
    """Median time of one call in microseconds, from graph replays."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()
        self.anchor = torch.cuda.CUDAGraph()  # a pool lives as long as some graph uses it
        with torch.cuda.stream(self.stream):
            one = torch.zeros(1, device="cuda")
            self.stream.synchronize()
            self.anchor.capture_begin(pool=self.pool)
            one.add_(1)
            self.anchor.capture_end()

    def __call__(self, calls: list[Callable[[], object]], *, target_ms: float = 3.0, samples: int = 5) -> float:
        return self.together([calls], target_ms=target_ms, samples=samples, warm_ms=0.5)[0]

    def together(
        self, sides: list[list[Callable[[], object]]], *, target_ms: float = 4.0, samples: int = 7, warm_ms: float = 5.0
    ) -> list[float]:
        """Times of several implementations whose samples take turns, so that all see the same clocks."""
        graphs = [self._capture(calls) for calls in sides]
        repeats = []
        for graph in graphs:
            graph.replay()
            once = self._replay(graph, 1)
            self._replay(graph, max(1, math.ceil(warm_ms * 1e3 / once)))
            repeats.append(max(1, min(50, math.ceil(target_ms * 1e3 / self._replay(graph, 1)))))
            samples = min(samples, 3 if once > 5 * target_ms * 1e3 else samples)
        times: list[list[float]] = [[] for _ in sides]
        for _ in range(samples):
            for side, graph in enumerate(graphs):
                times[side].append(self._replay(graph, repeats[side]) / repeats[side])
        return [sorted(t)[len(t) // 2] / len(calls) for t, calls in zip(times, sides, strict=True)]

    def _capture(self, calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
        with torch.cuda.stream(self.stream):
            calls[0]()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Not `torch.cuda.graph`: that empties the allocator's cache each time, and there are thousands of captures.
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=self.pool)
            for call in calls:
                call()
            graph.capture_end()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3


class Inputs:
    """What one point of the comparison works on: `turns` routings over the model's layers."""

    def __init__(self, model: Model, layers: list[Layer], tokens: int, share: int, kind: str) -> None:
        self.model, self.tokens, self.share = model, tokens, share
        self.local = model.experts // share
        turns = 8 if tokens <= 512 else 2
        table = torch.full((model.experts,), -1, dtype=torch.int32, device="cuda")
        table[: self.local] = torch.arange(self.local, dtype=torch.int32, device="cuda")
        self.table = table
        self.x = torch.randn(tokens, model.hidden, device="cuda", dtype=torch.bfloat16)
        self.ids = [make_routing(model, tokens, kind, seed) for seed in range(turns)]
        self.local_ids = [table[ids.long()].contiguous() for ids in self.ids]
        raw = torch.rand(tokens, model.top_k, device="cuda")
        self.weights = raw / raw.sum(1, keepdim=True)
        self.layers = [layers[i % len(layers)] for i in range(turns)]

    def ours(self, plan: MoePlan | None = None) -> list[Callable[[], object]]:
        def call(i: int) -> torch.Tensor:
            layer = self.layers[i]
            return fused_moe(
                self.x, layer.w13, layer.w2, self.ids[i], self.weights, slot_table=self.table,
                mapped_slots=self.local, w13_scale=layer.w13_scale, w2_scale=layer.w2_scale, plan=plan,
            )  # fmt: skip

        return [lambda i=i: call(i) for i in range(len(self.ids))]  # type: ignore[misc]

    def theirs(self, baseline: Any) -> list[Callable[[], object]]:
        return [
            lambda i=i: baseline(self.model, self.layers[i], self.share, self.x, self.local_ids[i], self.weights)
            for i in range(len(self.ids))
        ]  # type: ignore[misc]

    def roofline_us(self, ceilings: dict[str, float]) -> dict[str, float]:
        """Every touched weight and every activation once through memory; every local pair through the tensor cores."""
        m = self.model
        touched = sum(len(ids[ids >= 0].unique()) for ids in self.local_ids) / len(self.local_ids)
        pairs = sum(int((ids >= 0).sum()) for ids in self.local_ids) / len(self.local_ids)
        moved = touched * m.expert_bytes + 2 * self.tokens * m.hidden * 2
        flops = 6 * pairs * m.hidden * m.inter
        rate = ceilings["fp8_tflops" if m.fp8 else "bf16_tflops"] * 1e12
        memory, compute = moved / (max(ceilings["copy_tb_s"], ceilings["read_tb_s"]) * 1e12) * 1e6, flops / rate * 1e6
        return {"memory_us": memory, "compute_us": compute, "local_pairs": pairs, "experts_touched": touched}


def ceilings() -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and dense matmul rates of this card, on random data."""
    timer = Timer()
    a = torch.randn(1 << 30, device="cuda")
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / timer([lambda: torch.neg(a, out=b)], target_ms=20) / 1e6
    read = a.nbytes / timer([lambda: a.sum()], target_ms=20) / 1e6
    n = 8192
    x = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    y = torch.randn(n, n, device="cuda", dtype=torch.bfloat16)
    bf16 = 2 * n**3 / timer([lambda: x @ y], target_ms=30) / 1e6
    qx, qy = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    fp8 = 2 * n**3 / timer(
        [lambda: torch._scaled_mm(qx, qy.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)], target_ms=30
    ) / 1e6  # fmt: skip
    return {"copy_tb_s": copy, "read_tb_s": read, "bf16_tflops": bf16, "fp8_tflops": fp8}


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
    found = {}
    for name, tokens, plan in (
        ("direct", 9, MoePlan(direct=True, w13=small, w2=small)),
        ("direct tma swap", 9, MoePlan(direct=True, w13=replace(small, tma=True, swap_ab=True), w2=replace(small, tma=True, swap_ab=True))),
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


def check(model: Model, layer: Layer, results: list[dict[str, Any]], *, quick: bool) -> None:
    """Errors of tuned and default plans, over sizes, shares and routings, on fresh inputs."""
    dtype = "fp8" if model.fp8 else "bf16"
    sizes = (1, 17, 300) if quick else (1, 3, 16, 33, 250, 1024, 4099)
    for seed, tokens in enumerate(sizes):
        for share in (1, 8):
            for kind in ("uniform", "skewed"):
                for name, plan in (
                    ("chosen", None),
                    ("default", default_plan(tokens, model.top_k, model.experts, fp8=model.fp8)),
                ):
                    value = error_of(model, layer, tokens, share, kind, plan, seed)
                    results.append(
                        dict(model=model.name, dtype=dtype, tokens=tokens, share=share, routing=kind, plan=name,
                             error=value, limit=LIMITS[dtype], ok=value <= LIMITS[dtype])
                    )  # fmt: skip
    if not model.fp8:
        halved = Layer(
            w13=layer.w13.half(), w2=layer.w2.half(), w13_scale=None, w2_scale=None, contiguous=layer.contiguous
        )
        for tokens in (1, 17, 300):
            value = error_of(model, halved, tokens, 1, "uniform", None, tokens, half=True)
            results.append(
                dict(model=model.name, dtype="fp16", tokens=tokens, share=1, routing="uniform", plan="chosen",
                     error=value, limit=LIMITS["fp16"], ok=value <= LIMITS["fp16"])
            )  # fmt: skip


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


def compare_point(
    timer: Timer, model: Model, layers: list[Layer], tokens: int, share: int, kind: str, baseline: Any,
    limits: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    inputs = Inputs(model, layers, tokens, share, kind)
    plan = plan_for(tokens, model.top_k, inputs.local, 1 / share, model.hidden, model.inter, model.weight_dtype)
    point: dict[str, Any] = dict(
        model=model.name, dtype="fp8" if model.fp8 else "bf16", share=share, routing=kind, tokens=tokens
    )
    point.update(inputs.roofline_us(limits))
    sides = [inputs.ours(plan)] + ([inputs.theirs(baseline)] if baseline is not None else [])
    point["ours_us"], *other_us = timer.together(sides)
    bound = max(point["memory_us"], point["compute_us"])
    point.update(bound="memory" if point["memory_us"] >= point["compute_us"] else "compute",
                 roofline_fraction=bound / point["ours_us"], plan=plan.to_json())  # fmt: skip
    poison()
    sample = torch.randperm(tokens, device="cuda")[:6]
    wanted = reference(model, inputs.layers[0], inputs.x[sample], inputs.local_ids[0][sample], inputs.weights[sample])
    point["error"] = relative(sides[0][0](), sample, wanted)
    if other_us:
        point["sglang_us"] = other_us[0]
        point["speedup"] = other_us[0] / point["ours_us"]
        point["sglang_error"] = relative(sides[1][0](), sample, wanted)
    return point


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def table(points: list[dict[str, Any]]) -> None:
    """A line for each model, share and routing: speedup at each size."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for p in points:
        groups.setdefault((p["model"], p["share"], p["routing"]), []).append(p)
    for key, members in groups.items():
        cells = " ".join(
            f"{p['tokens']}:{p.get('speedup', math.nan):.2f}({p['ours_us']:.0f}us,{p['roofline_fraction']:.0%})"
            for p in members
        )
        print(*key, cells)


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    helpers = []
    here = str(Path(__file__))
    if args.compile:
        helpers = [
            subprocess.Popen(
                [sys.executable, here, "compile", str(i), str(args.compile), *(["--all"] if args.tune else [])]
            )
            for i in range(args.compile)
        ]
    if args.site:
        wait_for(args.site)
        warm = [
            subprocess.Popen(
                [sys.executable, here, "baseline-warm", m.name], env={**os.environ, "PYTHONPATH": args.site}
            )
            for m in MODELS
        ]
        helpers += warm
    result: dict[str, Any] = dict(
        device=torch.cuda.get_device_name(), torch=torch.__version__, errors=[], tuned={}, points=[], notes=[]
    )

    def save() -> None:
        (out / "moe-h200.json").write_text(json.dumps(result))

    baseline: Any = None
    try:
        result["unmapped_slots"] = unmapped_slots()
        say("unmapped slots", result["unmapped_slots"])
    except Exception as e:
        result["notes"].append(f"unmapped slots: {type(e).__name__}: {e}"[:500])
        say(result["notes"][-1])
    layers = {m.name: make_layers(m) for m in MODELS if m.name in args.models}
    say("weights made", {n: [len(v)] for n, v in layers.items()}, torch.cuda.memory_allocated() >> 30, "GiB")
    models = [m for m in MODELS if m.name in args.models]
    for m in models if not args.skip_check else []:
        try:
            check(m, layers[m.name][0], result["errors"], quick=True)
        except Exception as e:
            result["notes"].append(f"check {m.name}: {type(e).__name__}: {e}"[:500])
    say("errors", len(result["errors"]), "worst", max((e["error"] / e["limit"] for e in result["errors"]), default=0),
        [e for e in result["errors"] if not e["ok"]][:6], result["notes"])  # fmt: skip
    if args.site:
        sys.path.insert(0, args.site)
        try:
            from moe_baseline import SglangMoe

            baseline = SglangMoe()
        except Exception as e:
            result["notes"].append(f"baseline: {type(e).__name__}: {e}"[:800])
            say(result["notes"][-1])
    say("baseline imported")
    for helper in helpers:
        try:
            helper.wait(max(1, args.warm_until - (time.monotonic() - START)))
        except subprocess.TimeoutExpired:
            helper.kill()
            result["notes"].append("a warm-up process was cut off")
    say("helpers done", [h.returncode for h in helpers])
    result["ceilings"] = limits = ceilings()
    say("ceilings", limits)
    save()
    timer = Timer()
    if args.tune:
        for m in models:
            name = shape_name(m.hidden, m.inter, m.weight_dtype)
            entries = result["tuned"][name] = [
                {"tokens": e.tokens, "share": e.share, "plan": e.plan.to_json()} for e in tuned_entries(name)
            ]
            if args.tune_models and m.name not in args.tune_models:
                continue
            for share in TUNED_SHARES:
                for tokens in BRIEF_TOKENS if args.brief else TUNED_TOKENS:
                    if time.monotonic() - START > args.tune_until or tokens < args.tune_from:
                        continue
                    try:
                        entry = tune_point(timer, m, layers[m.name], tokens, share)
                    except Exception as e:
                        result["notes"].append(f"tune {m.name} {tokens} {share}: {type(e).__name__}: {e}"[:300])
                        continue
                    entries[:] = [e for e in entries if (e["tokens"], e["share"]) != (tokens, 1 / share)] + [entry]
            say("tuned", m.name, len(entries), result["notes"][-2:])
            save()
    if args.tune:
        install(result["tuned"])
    todo = [(m, s, "uniform", t) for m in models for s in SHARES for t in TOKENS]
    todo += [(m, s, "skewed", t) for m in models for s in SHARES for t in SKEWED_TOKENS]
    if args.quick:
        todo = [(m, s, "uniform", t) for m in models for s in (1, 8) for t in (1, 64, 4096)]
    if args.brief:
        todo = [(m, s, "uniform", t) for m in models for s in TUNED_SHARES for t in BRIEF_TOKENS]
    for m, share, kind, tokens in todo:
        if time.monotonic() - START > args.until:
            result["notes"].append(f"out of time before {m.name} {share} {kind} {tokens}")
            break
        try:
            result["points"].append(compare_point(timer, m, layers[m.name], tokens, share, kind, baseline, limits))
        except Exception as e:
            result["notes"].append(f"{m.name} {share} {kind} {tokens}: {type(e).__name__}: {e}"[:400])
    say("compared", len(result["points"]))
    save()
    table(result["points"])
    speedups = [p["speedup"] for p in result["points"] if "speedup" in p]
    result["geomean_speedup"] = geomean(speedups)
    result["below_one"] = sum(s < 1 for s in speedups)
    save()
    say("geomean", result["geomean_speedup"], "below 1.0:", result["below_one"], "of", len(speedups))
    say("notes", result["notes"][:12])


def install(tuned: dict[str, list[dict[str, Any]]], directory: Path = CONFIG_DIR) -> None:
    """Write what tuning found to where `plan_for` looks."""
    for name, entries in tuned.items():
        kept = [{k: e[k] for k in ("tokens", "share", "plan")} for e in entries]
        text = ",\n  ".join(json.dumps(e) for e in kept)
        (directory / f"{name}.json").write_text(f'{{"device": "NVIDIA H200", "entries": [\n  {text}\n]}}\n')
    tuned_entries.cache_clear()
    plan_for.cache_clear()


def wait_for(site: str) -> None:
    """The archive with SGLang is unpacked beside this process; `.done` says when."""
    deadline = time.monotonic() + 60
    while not (Path(site) / ".done").exists() and time.monotonic() < deadline:
        time.sleep(0.2)


def baseline_warm(name: str) -> None:
    """Call the baseline at every size on small weights, so that its kernels are compiled before anything is timed."""
    from moe_baseline import SglangMoe

    model = replace(next(m for m in MODELS if m.name == name), layers=1)
    baseline = SglangMoe()
    say("baseline import", name)
    e, h, i = model.experts, model.hidden, model.inter
    w13 = torch.empty(e, 2 * i, h, dtype=model.weight_dtype, device="cuda")
    w2 = torch.empty(e, h, i, dtype=model.weight_dtype, device="cuda")
    scales = (None, None)
    if model.fp8:
        scales = (
            torch.ones(e, 2 * i // 128, h // 128, device="cuda"), torch.ones(e, h // 128, i // 128, device="cuda"),
        )  # type: ignore[assignment]  # fmt: skip
    layer = Layer(w13=w13, w2=w2, w13_scale=scales[0], w2_scale=scales[1], contiguous=(w13, w2))
    for share in (1, 8):
        for tokens in TOKENS:
            x = torch.randn(tokens, h, device="cuda", dtype=torch.bfloat16)
            ids = make_routing(model, tokens, "uniform", 1)
            ids = torch.where(ids < e // share, ids, -1)
            baseline(model, layer, share, x, ids, torch.rand(tokens, model.top_k, device="cuda"))
        torch.cuda.synchronize()
        say("baseline warm", name, share)


def compile_part(part: int, parts: int, *, every: bool) -> None:
    """Compile this part's share of the installed plans, or of every candidate, for sm_90 into Triton's cache. Runs on any machine."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Target:
        """Stands in for the CUDA driver: compiling needs to know the target and nothing else."""

        utils = type("utils", (), {"get_device_properties": staticmethod(lambda d: {"max_shared_mem": 232448})})

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    import elasticmoe_kernels.triton.gemm_down as down
    import elasticmoe_kernels.triton.gemm_swiglu as swiglu
    import elasticmoe_kernels.triton.moe as layer_module

    driver.set_active(Target())  # type: ignore[arg-type]
    launch = jit.JITFunction.run
    jit.JITFunction.run = lambda self, *a, grid, warmup, **k: launch(self, *a, grid=grid, warmup=True, **k)
    layer_module.supports_pdl = lambda device: True
    down.multiprocessors = swiglu.multiprocessors = lambda device: 132
    down.address = swiglu.address = lambda tensor: 1 << 40  # any 64-bit multiple of 16
    # The longest to compile first, dealt out like cards.
    failed = 0
    for model in MODELS:
        layer = make_layers(replace(model, layers=1), "meta", copies=False)[0]
        name = shape_name(model.hidden, model.inter, model.weight_dtype)
        wanted = list(plans(model)) if every else []
        wanted += list(dict.fromkeys((e.tokens, e.plan) for e in tuned_entries(name)))
        for index, (tokens, plan) in enumerate(wanted):
            if index % parts != part:
                continue
            x = torch.empty(tokens, model.hidden, dtype=torch.bfloat16, device="meta")
            ids = torch.empty(tokens, model.top_k, dtype=torch.int32, device="meta")
            table_ = torch.empty(model.experts, dtype=torch.int32, device="meta")
            try:
                fused_moe(
                    x, layer.w13, layer.w2, ids, torch.empty(tokens, model.top_k, device="meta"), slot_table=table_,
                    w13_scale=layer.w13_scale, w2_scale=layer.w2_scale, plan=plan,
                )  # fmt: skip
            except Exception as e:
                failed += 1
                say("does not compile:", model.name, plan, f"{type(e).__name__}: {e}"[:300])
    if part == 0 or failed:
        say(f"compile part {part}: done, {failed} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile")
    compiling.add_argument("part", type=int)
    compiling.add_argument("parts", type=int)
    compiling.add_argument("--all", action="store_true", help="every candidate, not only what the configs name")
    commands.add_parser("baseline-warm").add_argument("model")
    installing = commands.add_parser("install")
    installing.add_argument("data")
    plot = commands.add_parser("plot")
    plot.add_argument("data")
    plot.add_argument("image")
    running = commands.add_parser("run")
    running.add_argument("--out", required=True)
    running.add_argument("--site", help="folder with SGLang for this machine; without it there is no baseline")
    running.add_argument("--models", nargs="*", default=[m.name for m in MODELS])
    running.add_argument("--tune", action="store_true")
    running.add_argument("--tune-from", type=int, default=1, help="tune for so many tokens and more, keep the rest")
    running.add_argument("--tune-models", nargs="*", help="tune these only")
    running.add_argument("--quick", action="store_true", help="a few points only")
    running.add_argument("--brief", action="store_true", help="tune and compare at every third size, EP 1 and 8")
    running.add_argument("--skip-check", action="store_true")
    running.add_argument("--compile", type=int, default=0, help="processes that compile the candidates beforehand")
    running.add_argument("--warm-until", type=float, default=120, help="seconds from the start, likewise below")
    running.add_argument("--tune-until", type=float, default=240)
    running.add_argument("--until", type=float, default=420)
    args = parser.parse_args()
    if args.command == "compile":
        compile_part(args.part, args.parts, every=args.all)
    elif args.command == "baseline-warm":
        baseline_warm(args.model)
    elif args.command == "install":
        install(json.loads(Path(args.data).read_text())["tuned"])
    elif args.command == "plot":
        from moe_plot import plot_file

        plot_file(Path(args.data), Path(args.image))
    else:
        run(args)


if __name__ == "__main__":
    main()
