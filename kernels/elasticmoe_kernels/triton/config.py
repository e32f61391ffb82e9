"""Launch configurations: what a tuning run found best, and rules for shapes without one.

`configs/<shape>.json` holds one file for each expert shape and dtype, written by `benchmarks/moe_kernels.py`. An entry
says for how many tokens and for which share of the experts it was tuned; a call takes the nearest entry.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elasticmoe_kernels.errors import ShapeError

CONFIG_DIR = Path(__file__).parent / "configs"
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True, kw_only=True)
class GemmConfig:
    """One grouped product's launch."""

    block_m: int
    """Rows of a tile. The first product's is the routing's; the second's divides it."""
    block_n: int
    """Output columns of a tile. The first product loads a gate and an up tile of so many rows each."""
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 1
    """Row blocks that walk over the columns together (L2 reuse of weights)."""
    swap_ab: bool = False
    """Compute the transpose, weights on the left: wgmma wants 64 rows there and takes 16 tokens on the right."""
    tma: bool = False
    """Weights through tensor descriptors instead of pointers."""
    tma_rows: bool = False
    """Second product only: rows through a tensor descriptor as well."""
    one_dot: bool = False
    """First product only: gate and up as one operand of 2 * block_n columns."""
    persistent: bool = False
    """A fixed number of programs walks over the tiles, instead of one program a tile."""
    per_sm: int = 1
    """Programs a multiprocessor, if persistent."""


@dataclass(frozen=True, kw_only=True)
class MoePlan:
    """How one call of the layer runs."""

    direct: bool
    """No routing launch (see `rows`): needs tokens <= block_m."""
    w13: GemmConfig
    w2: GemmConfig
    quantize_first: bool = False
    """fp8: quantize x in a launch of its own, not while loading."""

    def __post_init__(self) -> None:
        if self.w13.block_m % self.w2.block_m or (self.direct and self.w13.block_m != self.w2.block_m):
            raise ShapeError(
                f"w2.block_m {self.w2.block_m} must divide w13.block_m {self.w13.block_m} (and equal it if direct)"
            )

    @property
    def quantize_h(self) -> bool:
        """fp8: h leaves the first product quantized. Needs a whole group of 128 columns in one tile."""
        return self.quantize_first and self.w13.block_n == 128

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> MoePlan:
        known = {**data, "w13": GemmConfig(**data["w13"]), "w2": GemmConfig(**data["w2"])}
        return MoePlan(**known)


def default_plan(tokens: int, top_k: int, experts: int, *, fp8: bool) -> MoePlan:
    """A plan that is right everywhere and decent on Hopper. experts: how many the pairs spread over."""
    rows = tokens * top_k / max(experts, 1)
    if tokens <= 16 or rows <= 24:
        block_m, block_n, block_k, warps, stages = 16, 32, 128 if fp8 else 256, 4, 4
    elif rows <= 96:
        block_m, block_n, block_k, warps, stages = 64, 64, 128 if fp8 else 64, 4, 4
    else:
        block_m, block_n, block_k, warps, stages = 128, 128, 128 if fp8 else 64, 8, 3
    w13 = GemmConfig(
        block_m=block_m, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages,
        group_m=1 if block_m == 16 else 8,
    )  # fmt: skip
    w2 = replace(w13, block_n=min(2 * block_n, 128), num_stages=4 if block_m < 128 else 3)
    return MoePlan(direct=tokens <= 16, w13=w13, w2=w2, quantize_first=fp8 and tokens > 16 and block_n == 128)


@dataclass(frozen=True, kw_only=True)
class TunedEntry:
    """A plan and what it was tuned for: `tokens` gathered over all ranks, `share` of the experts on this rank."""

    tokens: int
    share: float
    plan: MoePlan


def shape_name(hidden: int, inter: int, dtype: torch.dtype) -> str:
    return f"H{hidden}-I{inter}-{DTYPE_NAMES[dtype]}"


@functools.cache
def tuned_entries(name: str, directory: Path = CONFIG_DIR) -> tuple[TunedEntry, ...]:
    """Entries of `configs/<name>.json`, none if there is no such file (fp16 shares bf16's)."""
    path = directory / f"{name}.json"
    if not path.exists():
        path = directory / f"{name.replace('-fp16', '-bf16')}.json"
        if not path.exists():
            return ()
    data = json.loads(path.read_text())
    entries = [
        TunedEntry(tokens=e["tokens"], share=e["share"], plan=MoePlan.from_json(e["plan"])) for e in data["entries"]
    ]
    # Between two sizes the larger one's plan: a tile too large costs less than a weight read twice.
    return tuple(sorted(entries, key=lambda e: -e.tokens))


@functools.lru_cache(maxsize=4096)
def plan_for(
    tokens: int, top_k: int, experts: int, share: float, hidden: int, inter: int, dtype: torch.dtype
) -> MoePlan:
    """The plan of the nearest tuned entry by log2 of tokens and share, else `default_plan`.

    experts: experts on this rank. dtype: the weights'. A direct entry serves only batches that fit its block.
    """
    best: TunedEntry | None = None
    distance = math.inf
    for entry in tuned_entries(shape_name(hidden, inter, dtype)):
        if entry.plan.direct and tokens > entry.plan.w13.block_m:
            continue
        d = abs(math.log2(max(tokens, 1) / entry.tokens)) + abs(math.log2(share / entry.share))
        if d < distance:
            best, distance = entry, d
    if best is not None:
        return best.plan
    return default_plan(tokens, top_k, experts, fp8=dtype == torch.float8_e4m3fn)
