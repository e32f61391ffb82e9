"""What the ranks of `device_workers.py` do and check: the kernels' collectives against torch on gathered copies.

Every function runs in the workers, at the same time in all ranks of a membership.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elasticmoe_kernels.triton import collectives
from elasticmoe_sglang.errors import CollectiveError
from tests.helpers.device_workers import DeviceContext, Failed

__all__ = ["Failed"]

REDUCTIONS = {
    collectives.SUM: lambda rows: rows.sum(0),
    collectives.AVERAGE: lambda rows: rows.mean(0),
    collectives.MINIMUM: lambda rows: rows.amin(0),
    collectives.MAXIMUM: lambda rows: rows.amax(0),
}

GPU_CASES: tuple[tuple[tuple[int, ...], torch.dtype, int, tuple[int, ...]], ...] = (
    ((3, 4096, 300_000), torch.bfloat16, 0, (collectives.SUM,)),
    ((1000,), torch.bfloat16, 1, (collectives.SUM,)),
    ((17, 65_536), torch.float16, 0, (collectives.SUM,)),
    ((1000,), torch.float32, 0, (collectives.SUM,)),
    ((5, 640), torch.int64, 0, (collectives.SUM,)),
    ((70,), torch.uint8, 0, ()),
)
"""(counts, dtype, offset, reductions) for `everything`: few, since each kernel is compiled first."""


def values(rank: int, count: int, dtype: torch.dtype, salt: int) -> Tensor:
    """What a rank puts in: every process can make any rank's. On the CPU."""
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).to(dtype)
    return torch.randint(-(1 << 20), 1 << 20, (count,), generator=generator).to(dtype)


def _spoiled(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((count,), float("nan") if dtype.is_floating_point else 5, dtype=dtype, device=device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else torch.int64


def _same(ours: Tensor, wanted: Tensor, what: str, *, exact: bool) -> None:
    ours = ours.cpu()
    if exact:
        assert torch.equal(ours, wanted), f"{what}: {ours[:4]} is not {wanted[:4]}"
        return
    limit = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-14}[ours.dtype]
    error = float((ours.double() - wanted.double()).norm() / max(1e-30, float(wanted.double().norm())))
    assert error <= limit, f"{what}: relative error {error:g}"


def everything(
    context: DeviceContext,
    ranks: tuple[int, ...],
    epoch: int,
    counts: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    offset: int = 0,
    reductions: tuple[int, ...] = tuple(REDUCTIONS),
) -> int:
    """All collectives of these sizes and dtypes; offset: elements by which the tensors miss a 16-byte boundary.

    epoch: -1 leaves the membership as it is.

    Returns how many results were compared.
    """
    if epoch >= 0:
        context.adopt(ranks, epoch)
    device, group = context.device, context.everybody
    made = 0
    for salt, (dtype, count) in enumerate(itertools.product(dtypes, counts)):
        made += _gather(device, group, ranks, dtype, count, salt, offset)
        if dtype in collectives.REDUCED_DTYPES:
            for reduction in reductions:
                if reduction != collectives.AVERAGE or dtype.is_floating_point:
                    made += _reductions(device, group, ranks, dtype, count, salt, offset, reduction)
        made += _broadcast(device, group, ranks, dtype, count, salt)
    device.drain()
    device.check()
    return made


def _gather(device: Any, group: Any, ranks: Any, dtype: Any, count: int, salt: int, offset: int) -> int:
    me, capacity = device.region.rank, device.region.capacity
    floats = dtype.is_floating_point
    inp = _spoiled(count + offset, dtype, device.device)[offset:]
    inp.copy_(values(me, count, dtype, salt))
    out = _spoiled(capacity * count + offset, dtype, device.device)[offset:]
    wanted = torch.zeros(capacity, count, dtype=dtype) if floats else torch.full((capacity, count), 5, dtype=dtype)
    for rank in ranks:
        wanted[rank] = values(rank, count, dtype, salt)
    collectives.all_gather(device.windows, group, out, inp, zero_absent=floats)
    _same(out, wanted.view(-1), f"all_gather {count} {dtype}", exact=True)
    return 1


def _reductions(
    device: Any, group: Any, ranks: Any, dtype: Any, count: int, salt: int, offset: int, reduction: int
) -> int:
    me, capacity = device.region.rank, device.region.capacity
    parts = torch.stack([values(rank, capacity * count, dtype, salt) for rank in ranks]).to(_wide(dtype))
    wanted = REDUCTIONS[reduction](parts).to(dtype)
    exact = reduction in (collectives.MINIMUM, collectives.MAXIMUM) or not dtype.is_floating_point
    inp = _spoiled(capacity * count + offset, dtype, device.device)[offset:]
    inp.copy_(values(me, capacity * count, dtype, salt))
    out = _spoiled(count, dtype, device.device)
    collectives.reduce_scatter(device.windows, group, out, inp, reduction=reduction)
    _same(out, wanted[me * count : (me + 1) * count], f"reduce_scatter {count} {dtype}", exact=exact)
    for sliced in (False, True):
        out = _spoiled(capacity * count, dtype, device.device)
        if sliced:  # in place
            out = inp
        collectives.all_reduce(device.windows, group, out, inp, reduction=reduction, sliced=sliced)
        _same(out, wanted, f"all_reduce {count} {dtype} {sliced=}", exact=exact)
    return 3


def _broadcast(device: Any, group: Any, ranks: Any, dtype: Any, count: int, salt: int) -> int:
    for root in (ranks[0], ranks[-1]):
        tensor = values(device.region.rank, count, dtype, salt + root).to(device.device)
        collectives.broadcast(device.windows, group, tensor, root=root)
        _same(tensor, values(root, count, dtype, salt + root), f"broadcast {count} {dtype} from {root}", exact=True)
    return 2


def alone(context: DeviceContext, times: int) -> None:
    """Collectives of a rank that is alone: they touch nobody, and count steps that nobody else counts."""
    context.region.solo()
    device, group = context.device, context.everybody
    for turn in range(times):
        assert _gather(device, group, (context.rank,), torch.float32, 40, turn, 0)
    device.check()


def meet_or_fail(
    context: DeviceContext,
    ranks: tuple[int, ...],
    epoch: int,
    count: int,
    delay_s: float = 0.0,
    met: Callable[[], None] = lambda: None,
) -> Any:
    """One all-reduce after a delay: the seconds it took, and the error that the device reported (None: none). `met` is
    called once all have met."""
    context.adopt(ranks, epoch)
    device, group = context.device, context.everybody
    tensor = torch.ones(count, dtype=torch.float32, device=device.device)
    collectives.all_reduce(device.windows, group, tensor, tensor.clone())  # everybody is there, everything compiled
    device.drain()
    met()
    time.sleep(delay_s)
    started = time.monotonic()
    for _ in range(3):
        collectives.all_reduce(device.windows, group, tensor, tensor.clone())
    device.drain()
    seconds = time.monotonic() - started
    try:
        device.check()
    except CollectiveError as error:
        return seconds, error
    return seconds, None


def stop_while_waiting(context: DeviceContext, ranks: tuple[int, ...], epoch: int, after_s: float) -> Any:
    """`meet_or_fail` with a peer that meets once and never again, of which the host is told `after_s` later."""
    told = threading.Timer(after_s, context.device.stop_waiting)
    try:
        return meet_or_fail(context, ranks, epoch, 40, met=told.start)
    finally:
        told.join()


def differ(context: DeviceContext, ranks: tuple[int, ...], epoch: int, after_s: float = 0.0) -> Any:
    """Rank 0 calls another size than the rest, after_s late; the error of the device."""
    context.adopt(ranks, epoch)
    time.sleep(after_s)
    device, group = context.device, context.everybody
    tensor = torch.ones(64 if context.rank == 0 else 128, dtype=torch.float32, device=device.device)
    collectives.all_reduce(device.windows, group, tensor, tensor.clone())
    device.drain()
    try:
        device.check()
    except CollectiveError as error:
        return error
    return None


def prefetch(context: DeviceContext, ranks: tuple[int, ...]) -> list[int]:
    """Map windows ahead of the commit; the ranks whose windows are mapped then."""
    context.device.prefetch(ranks)
    return sorted(context.device._mapped)


def warm_up(context: DeviceContext) -> None:
    """Alone: every kernel that the GPU tests use is compiled."""
    context.region.solo()
    for counts, dtype, offset, reductions in GPU_CASES:
        everything(context, (context.rank,), -1, counts, (dtype,), offset, reductions)
    averages = (collectives.AVERAGE, collectives.MAXIMUM)
    everything(context, (context.rank,), -1, (2048,), (torch.float32,), 0, averages)
    most = torch.zeros(1, dtype=torch.int64, device=context.device.device)
    collectives.all_reduce(context.device.windows, context.everybody, most, most, reduction=collectives.MAXIMUM)
