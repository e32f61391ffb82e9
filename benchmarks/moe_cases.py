"""Expert shapes, weights, routing and tuning candidates of the MoE kernel benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from elasticmoe_kernels.triton.config import GemmConfig, MoePlan

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SKEWED_TOKENS = (1, 8, 64, 512, 4096, 16384)
TUNED_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)
SHARES = (1, 2, 8)
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model's experts. Each column holds `layers` copies, used in turn, so that the weights are never in L2."""

    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    fp8: bool
    layers: int

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.fp8 else torch.bfloat16

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.inter * self.weight_dtype.itemsize


MODELS = (
    Model(name="Qwen3-30B-A3B", hidden=2048, inter=768, experts=128, top_k=8, fp8=False, layers=4),
    Model(name="DeepSeek-V2-Lite", hidden=2048, inter=1408, experts=64, top_k=6, fp8=False, layers=4),
    Model(name="DeepSeek-V3", hidden=7168, inter=2048, experts=256, top_k=8, fp8=True, layers=2),
)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's weights as views into the columns, and the contiguous copy the baseline gets."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor | None
    w2_scale: torch.Tensor | None
    contiguous: tuple[torch.Tensor, torch.Tensor]


def column_pitch(model: Model) -> int:
    """Bytes from one expert's column to the next: its layers, rounded up to the driver's 2 MiB granularity."""
    return -(-model.layers * model.expert_bytes // (2 * MIB)) * 2 * MIB


def make_layers(model: Model, device: str = "cuda", *, copies: bool = True) -> list[Layer]:
    """Random weights in expert columns: slot stride = column pitch, layers one behind the other inside a column."""
    size = model.weight_dtype.itemsize
    pitch = column_pitch(model) // size
    columns = torch.empty(model.experts * pitch, dtype=model.weight_dtype, device=device)
    layers = []
    e, h, i = model.experts, model.hidden, model.inter
    for layer in range(model.layers):
        base = layer * 3 * h * i
        w13 = columns.as_strided((e, 2 * i, h), (pitch, h, 1), base)
        w2 = columns.as_strided((e, h, i), (pitch, i, 1), base + 2 * i * h)
        scales: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if model.fp8:
            scales = (
                (torch.rand(e, 2 * i // 128, h // 128, device=device) + 0.5) / h**0.5,
                (torch.rand(e, h // 128, i // 128, device=device) + 0.5) / i**0.5,
            )
        if device != "meta":
            for slot in range(e):
                for w, fan_in in ((w13, h), (w2, i)):
                    random = torch.randn(w.shape[1:], device=device, dtype=torch.bfloat16)
                    w[slot] = (random if model.fp8 else random / fan_in**0.5).to(w.dtype)
        contiguous = (w13.contiguous(), w2.contiguous()) if copies else (w13, w2)
        layers.append(Layer(w13=w13, w2=w2, w13_scale=scales[0], w2_scale=scales[1], contiguous=contiguous))
    return layers


def make_routing(model: Model, tokens: int, kind: str, seed: int, device: str = "cuda") -> torch.Tensor:
    """Distinct expert ids [tokens, top_k] int32; uniform, or skewed: popularity 1 / rank over shuffled experts."""
    generator = torch.Generator(device).manual_seed(seed)
    scores = -torch.log(torch.rand(tokens, model.experts, generator=generator, device=device))
    if kind == "skewed":
        shuffled = torch.randperm(model.experts, generator=torch.Generator().manual_seed(7)).to(device)
        scores = scores * (1 + shuffled.float())
    # The smallest of exponentials with rate p: sampling without replacement with weights p.
    return scores.topk(model.top_k, largest=False).indices.int()


def _gemm(block_m: int, block_n: int, block_k: int, warps: int, stages: int, **more: object) -> GemmConfig:
    config = GemmConfig(block_m=block_m, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages)
    return replace(config, **more) if more else config  # type: ignore[arg-type]


def small_candidates(block_m: int, *, fp8: bool, down: bool) -> list[GemmConfig]:
    """Few rows per expert: the weights are streamed once, so bytes in flight matter."""
    m = block_m
    if fp8:
        found = [
            _gemm(m, 32, 128, 4, 5),
            _gemm(m, 64, 128, 4, 5, swap_ab=True, tma=True),
            _gemm(m, 128, 128, 4, 4, swap_ab=True, tma=True),
            _gemm(m, 128, 128, 8, 5, swap_ab=True, tma=True),
            _gemm(m, 64, 128, 4, 4, swap_ab=True),
        ]
        if down:
            return [*found, _gemm(m, 128, 128, 4, 6, swap_ab=True, tma=True)]
        return found + [
            _gemm(m, n, 128, w, st, swap_ab=True, tma=True, one_dot=True)
            for n, w, st in ((32, 4, 6), (64, 4, 5), (128, 4, 4), (128, 8, 5))
        ]
    found = [
        _gemm(m, 32, 128, 4, 4), _gemm(m, 32, 256, 4, 3), _gemm(m, 64, 64, 4, 5), _gemm(m, 64, 128, 4, 3),
        _gemm(m, 32, 128, 4, 5, tma=True), _gemm(m, 32, 256, 4, 3, tma=True),
        _gemm(m, 64, 64, 4, 5, swap_ab=True, tma=True), _gemm(m, 64, 128, 4, 3, swap_ab=True, tma=True),
        _gemm(m, 64, 128, 4, 4, swap_ab=True), _gemm(m, 128, 64, 4, 4, swap_ab=True, tma=True),
    ]  # fmt: skip
    return [*found, _gemm(m, 16, 256, 4, 4)] if not down else [*found, _gemm(m, 128, 64, 4, 4)]


def large_candidates(block_m: int, *, fp8: bool, down: bool) -> list[GemmConfig]:
    """Many rows per expert: tensor cores matter."""
    m = block_m
    if fp8:
        warps = 8 if m == 128 else 4
        wide = [_gemm(m, 128, 128, warps, s, tma=t, group_m=g) for s, t, g in
                ((3, False, 8), (3, True, 8), (4, True, 8), (3, True, 1))]  # fmt: skip
        wide += [
            _gemm(m, 128, 128, 8, 3, tma=True, group_m=8),
            _gemm(m, 128, 128, warps, 3, tma=True, persistent=True, group_m=8),
        ]
        if down:
            wide += [replace(c, tma_rows=True) for c in wide[1:3]]
            wide += [_gemm(m, 256, 128, 8, 3, tma=True, tma_rows=True, group_m=8)] if m <= 64 else []
        return list(dict.fromkeys(wide))
    if m == 64:
        found = [
            _gemm(m, 64, 64, 4, 4, group_m=8), _gemm(m, 64, 64, 4, 4, tma=True, group_m=8),
            _gemm(m, 128, 64, 4, 4, tma=True, group_m=8), _gemm(m, 128, 64, 8, 4, tma=True, group_m=8),
        ]  # fmt: skip
        if not down:
            found += [_gemm(m, 128, 64, 4, 4, tma=True, one_dot=True, group_m=8),
                      _gemm(m, 64, 64, 4, 4, tma=True, one_dot=True, group_m=1)]  # fmt: skip
        else:
            found += [_gemm(m, 256, 64, 8, 4, tma=True, tma_rows=True, group_m=8),
                      _gemm(m, 128, 64, 4, 4, tma=True, tma_rows=True, group_m=1)]  # fmt: skip
        return found
    if not down:
        return [
            _gemm(m, 128, 64, 8, 4, group_m=8), _gemm(m, 128, 64, 8, 4, tma=True, group_m=8),
            _gemm(m, 128, 64, 8, 4, tma=True, one_dot=True, group_m=8),
            _gemm(m, 128, 64, 8, 4, tma=True, one_dot=True, group_m=1),
            _gemm(m, 128, 64, 8, 3, tma=True, one_dot=True, group_m=16),
            _gemm(m, 128, 64, 8, 4, tma=True, one_dot=True, persistent=True, group_m=8),
            _gemm(m, 64, 64, 4, 4, tma=True, one_dot=True, group_m=8),
            _gemm(m, 64, 64, 8, 4, tma=True, one_dot=True, group_m=8),
        ]  # fmt: skip
    return [
        _gemm(m, 256, 64, 8, 4, group_m=8), _gemm(m, 256, 64, 8, 4, tma=True, group_m=8),
        _gemm(m, 256, 64, 8, 4, tma=True, tma_rows=True, group_m=8),
        _gemm(m, 256, 64, 8, 4, tma=True, tma_rows=True, group_m=1),
        _gemm(m, 256, 64, 8, 3, tma=True, tma_rows=True, group_m=16),
        _gemm(m, 256, 64, 8, 4, tma=True, tma_rows=True, persistent=True, group_m=8),
        _gemm(m, 128, 64, 4, 4, tma=True, tma_rows=True, group_m=8),
        _gemm(m, 128, 64, 8, 4, tma=True, tma_rows=True, group_m=8),
    ]  # fmt: skip


def families(model: Model, tokens: int) -> Iterator[tuple[bool, bool, list[GemmConfig], list[GemmConfig]]]:
    """(direct, quantize_first, w13 candidates, w2 candidates), each family with one block_m."""
    rows = tokens * model.top_k / model.experts
    f = model.fp8

    def both(make: object, m: int) -> tuple[list[GemmConfig], list[GemmConfig]]:
        assert callable(make)
        return make(m, fp8=f, down=False), make(m, fp8=f, down=True)

    if tokens <= 16:
        yield (True, False, *both(small_candidates, 16))
        if f:
            yield (True, True, *both(small_candidates, 16))
    if tokens == 32:
        yield (True, False, *both(small_candidates, 32))
    if tokens >= 16 and rows <= 16:
        yield (False, f, *both(small_candidates, 16))
    if 8 <= rows <= 64:
        yield (False, f, *both(small_candidates, 32))
    if 16 <= rows <= (512 if f else 128):
        yield (False, f, *both(large_candidates, 64))
    if rows >= 48:
        first, second = both(large_candidates, 128)
        # The second product may take half a block: in fp8 the smaller tile has registers to spare.
        yield (False, f, first, second + large_candidates(64, fp8=True, down=True) if f else second)


def fits(config: GemmConfig, model: Model, *, down: bool, quantize_first: bool) -> bool:
    """Whether a candidate fits into shared memory (227 KiB per block on Hopper)."""
    size = model.weight_dtype.itemsize
    activations = size if quantize_first or not model.fp8 else 3
    tile = config.block_k * (config.block_m * activations + config.block_n * (1 if down else 2) * size)
    return tile * config.num_stages <= 225 * 1024


def plans(model: Model) -> Iterator[tuple[int, MoePlan]]:
    """Every kernel the tuning can ask for, as (tokens, plan) pairs that compile it."""
    seen = set()
    for tokens in TUNED_TOKENS:
        for direct, quantize_first, first, second in families(model, tokens):
            a = [c for c in first if fits(c, model, down=False, quantize_first=quantize_first)]
            b = [c for c in second if fits(c, model, down=True, quantize_first=quantize_first)]
            # Every first with some second; every second behind a quantized and an unquantized h.
            pairs = [(c, b[n % len(b)]) for n, c in enumerate(a)]
            for width in {c.block_n == 128 for c in a} if quantize_first else ():
                front = next(c for c in a if (c.block_n == 128) == width)
                pairs += [(front, c) for c in b]
            pairs += [(a[n % len(a)], c) for n, c in enumerate(b)]
            for w13, w2 in pairs:
                plan = MoePlan(direct=direct, w13=w13, w2=w2, quantize_first=quantize_first)
                if plan not in seen:
                    seen.add(plan)
                    yield tokens, plan
