"""Timing by CUDA graph replays, the card's ceilings, and the inputs of one point of the comparison."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from moe_cases import Layer, Model, make_routing

from elasticmoe_kernels.triton.config import MoePlan
from elasticmoe_kernels.triton.moe import fused_moe


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
