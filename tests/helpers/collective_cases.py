"""One function a collective: runs ours through torch.distributed and gloo's on the members alone, and compares.

They run in the workers of `workers.py`. Each returns how many comparisons it made.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from tests.helpers.workers import WorkerContext, WorkerPool

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
_HALF = (torch.float16, torch.bfloat16)
_FILL = 5
REDUCTIONS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")


def reductions_for(dtype: torch.dtype) -> tuple[str, ...]:
    """Those that gloo has for a dtype; gloo adds bools up as bytes, which no bool can hold."""
    if dtype is torch.bool:
        return ("PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
    if dtype.is_floating_point:
        return REDUCTIONS[:5]
    return ("SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> Tensor:
    """What a rank puts in: the same in every process, different for every rank."""
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def filled(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An output as a caller hands it over: not zero."""
    return torch.full(shape, 1 if dtype is torch.bool else _FILL, dtype=dtype)


def absent_row(prefilled: Tensor) -> Tensor:
    """What becomes of an inactive rank's row: zero for floats, as it was otherwise."""
    return torch.zeros_like(prefilled) if prefilled.dtype.is_floating_point else prefilled.clone()


class Pair:
    """Our group of all ranks, and a gloo group of the members only."""

    def __init__(self, context: WorkerContext, ranks: tuple[int, ...], epoch: int) -> None:
        context.adopt(ranks, epoch)
        self.ranks = ranks
        self.rank = context.rank
        self.capacity = context.region.capacity
        self.ours: Any = context.memo["group"]
        self.here = ranks.index(context.rank)
        key = ("gloo", epoch)
        if key not in context.memo:
            store = dist.FileStore(os.path.join(context.scratch, f"gloo-{epoch}"), len(ranks))
            context.memo[key] = dist.ProcessGroupGloo(store, self.here, len(ranks), timedelta(seconds=30))
        self.gloo: Any = context.memo[key]

    def rows(self, compact: list[Tensor], prefilled: Tensor) -> Tensor:
        """Gloo's rows at the members' places, the rule's rows elsewhere."""
        full = [absent_row(prefilled) for _ in range(self.capacity)]
        for rank, row in zip(self.ranks, compact, strict=True):
            full[rank] = row
        return torch.stack(full)


def same(ours: Tensor, theirs: Tensor, what: str, *, summed: bool = False) -> None:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    if summed and ours.dtype in _HALF:
        # Gloo rounds after every addition; ours once.
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2, msg=lambda text: what + text)
    elif summed and ours.dtype.is_floating_point:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda text: what + text)
    else:
        assert torch.equal(ours, theirs), f"{what}: {ours.flatten()[:8]} against gloo's {theirs.flatten()[:8]}"


def _gloo_reduce(opts: Any, name: str) -> Any:
    opts.reduceOp = getattr(dist.ReduceOp, name)
    return opts


def _op(name: str) -> Any:
    return getattr(dist.ReduceOp, name)


_ROUNDING = ("SUM", "AVG", "PRODUCT")


def all_reduce(pair: Pair, dtype: torch.dtype, count: int) -> int:
    for name in reductions_for(dtype):
        ours = values(pair.rank, (count,), dtype)
        theirs = ours.clone()
        dist.all_reduce(ours, op=_op(name), group=pair.ours)
        pair.gloo.allreduce([theirs], _gloo_reduce(c10d.AllreduceOptions(), name)).wait()
        same(ours, theirs, f"all_reduce {name} {dtype} x{count}", summed=name in _ROUNDING)
    return len(reductions_for(dtype))


def all_reduce_bits(pair: Pair, dtype: torch.dtype, count: int) -> list[int]:
    """The bits of a sum, for comparing them between ranks, and with the sum in rank order."""
    ours = values(pair.rank, (count,), dtype, salt=9)
    dist.all_reduce(ours, group=pair.ours)
    wide = torch.float32 if dtype in _HALF else dtype
    total = values(pair.ranks[0], (count,), dtype, salt=9).to(wide)
    for rank in pair.ranks[1:]:
        total += values(rank, (count,), dtype, salt=9).to(wide)
    assert torch.equal(ours, total.to(dtype)), f"not the sum in rank order: {dtype} x{count}"
    return ours.view(torch.uint8).tolist()


def reduce(pair: Pair, dtype: torch.dtype, count: int) -> int:
    made = 0
    for root in pair.ranks:
        ours = values(pair.rank, (count,), dtype)
        theirs = ours.clone()
        name = "MAX" if dtype is torch.bool else "SUM"
        opts = _gloo_reduce(c10d.ReduceOptions(), name)
        opts.rootRank = pair.ranks.index(root)
        dist.reduce(ours, dst=root, op=_op(name), group=pair.ours)
        pair.gloo.reduce([theirs], opts).wait()
        if root == pair.rank:
            same(ours, theirs, f"reduce to {root} {dtype}", summed=True)
        else:
            assert torch.equal(ours, values(pair.rank, (count,), dtype)), "reduce changed the values of another rank"
        made += 1
    return made


def broadcast(pair: Pair, dtype: torch.dtype, count: int) -> int:
    for root in pair.ranks:
        ours, theirs = values(pair.rank, (count,), dtype), values(pair.rank, (count,), dtype)
        dist.broadcast(ours, src=root, group=pair.ours)
        opts = c10d.BroadcastOptions()
        opts.rootRank = pair.ranks.index(root)
        pair.gloo.broadcast([theirs], opts).wait()
        same(ours, theirs, f"broadcast from {root} {dtype} x{count}")
    return len(pair.ranks)


def all_gather(pair: Pair, dtype: torch.dtype, count: int) -> int:
    mine = values(pair.rank, (count,), dtype)
    prefilled = filled((count,), dtype)
    compact = [torch.empty_like(mine) for _ in pair.ranks]
    pair.gloo.allgather([compact], [mine]).wait()
    expected = pair.rows(compact, prefilled)

    single = filled((pair.capacity * count,), dtype)
    dist.all_gather_single(single, mine, group=pair.ours)
    same(single.view(pair.capacity, count), expected, f"all_gather_single {dtype} x{count}")
    rows = [filled((count,), dtype) for _ in range(pair.capacity)]
    dist.all_gather(rows, mine, group=pair.ours)
    same(torch.stack(rows), expected, f"all_gather {dtype} x{count}")
    # In place: my row of the output is my input.
    single = filled((pair.capacity * count,), dtype)
    single.view(pair.capacity, count)[pair.rank] = mine
    dist.all_gather_single(single, single[pair.rank * count : (pair.rank + 1) * count], group=pair.ours)
    same(single.view(pair.capacity, count), expected, f"all_gather_single in place {dtype} x{count}")
    # Strided input and output.
    wide = filled((pair.capacity, count, 2), dtype)[..., 0]
    dist.all_gather_single(wide, torch.stack((mine, mine), 1)[:, 0], group=pair.ours)
    same(wide.contiguous(), expected, f"all_gather_single strided {dtype} x{count}")
    return 4


def gather(pair: Pair, dtype: torch.dtype, count: int) -> int:
    mine = values(pair.rank, (count,), dtype)
    for root in pair.ranks:
        receiving = root == pair.rank
        rows = [filled((count,), dtype) for _ in range(pair.capacity)] if receiving else None
        dist.gather(mine, rows, dst=root, group=pair.ours)
        compact = [torch.empty_like(mine) for _ in pair.ranks]
        opts = c10d.GatherOptions()
        opts.rootRank = pair.ranks.index(root)
        pair.gloo.gather([compact] if receiving else [], [mine], opts).wait()
        if rows is not None:
            same(torch.stack(rows), pair.rows(compact, filled((count,), dtype)), f"gather to {root} {dtype}")
    return len(pair.ranks)


def reduce_scatter(pair: Pair, dtype: torch.dtype, count: int) -> int:
    made = 0
    for name in ("MAX",) if dtype is torch.bool else ("SUM", "MAX"):
        full = values(pair.rank, (pair.capacity, count), dtype)
        theirs = filled((count,), dtype)
        opts = _gloo_reduce(c10d.ReduceScatterOptions(), name)
        pair.gloo.reduce_scatter([theirs], [[full[rank].clone() for rank in pair.ranks]], opts).wait()
        single = filled((count,), dtype)
        dist.reduce_scatter_single(single, full.view(-1), op=_op(name), group=pair.ours)
        same(single, theirs, f"reduce_scatter_single {name} {dtype} x{count}", summed=True)
        made += 1
    return made


CASES: dict[str, Callable[[Pair, torch.dtype, int], int]] = {
    case.__name__: case
    for case in (
        all_reduce,
        reduce,
        broadcast,
        all_gather,
        gather,
        reduce_scatter,
    )
}


def run_case(context: WorkerContext, name: str, ranks: tuple[int, ...], epoch: int, counts: tuple[int, ...]) -> int:
    """One collective with every dtype and every number of values."""
    pair = Pair(context, ranks, epoch)
    made = 0
    for count in counts:
        for dtype in DTYPES:
            made += CASES[name](pair, dtype, count)
            dist.barrier(group=pair.ours)
    return made


def check_case(pool: WorkerPool, name: str, ranks: tuple[int, ...], epoch: int, counts: tuple[int, ...]) -> None:
    """The collective equals gloo's on all of these ranks, with every dtype."""
    made = pool.run(ranks, run_case, name, ranks, epoch, counts)
    assert all(count >= len(DTYPES) for count in made.values()), made


def run_bits(context: WorkerContext, ranks: tuple[int, ...], epoch: int, dtype: torch.dtype, count: int) -> list[int]:
    return all_reduce_bits(Pair(context, ranks, epoch), dtype, count)


def run_objects(context: WorkerContext, ranks: tuple[int, ...], epoch: int) -> dict[str, Any]:
    """The object collectives, as SGLang calls them."""
    pair = Pair(context, ranks, epoch)
    mine = {"rank": pair.rank, "text": "x" * (10 * pair.rank + 1)}
    gathered: list[Any] = ["before"] * pair.capacity
    dist.all_gather_object(gathered, mine, group=pair.ours)
    at_root: list[Any] | None = ["before"] * pair.capacity if pair.rank == 0 else None
    dist.gather_object(mine, at_root, dst=0, group=pair.ours)
    spread = [mine, pair.rank]
    dist.broadcast_object_list(spread, src=ranks[-1], group=pair.ours)
    return {"all_gather": gathered, "gather": at_root, "broadcast": spread}
