"""Graphs and torch.distributed over the windows: what the seats of `device_seats.py` do on a GPU."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from elasticmoe_kernels.triton import collectives
from elasticmoe_sglang.errors import CollectiveError
from elasticmoe_sglang.seats.cuda_group import install_cuda_groups
from elasticmoe_sglang.seats.process_group import init_elastic, install_backend
from tests.helpers.device_seats import DeviceContext

_graphs: dict[str, Any] = {}


def capture_alone(context: DeviceContext, count: int) -> None:
    """A graph of a layer's collectives, captured while nobody else takes part."""
    context.fabric.solo()
    device, group, capacity = context.device, context.everybody, context.fabric.capacity
    inp = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    rows = torch.zeros(capacity * count, dtype=torch.bfloat16, device="cuda")
    mine = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    total = torch.zeros(count, dtype=torch.bfloat16, device="cuda")

    def layer() -> None:
        collectives.all_gather(device.windows, group, rows, inp, zero_absent=True)
        collectives.reduce_scatter(device.windows, group, mine, rows)
        collectives.all_reduce(device.windows, group, total, inp)

    layer()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            layer()
    _graphs.update(graph=graph, inp=inp, rows=rows, mine=mine, total=total)


def replay_together(context: DeviceContext, seats: tuple[int, ...] | None, epoch: int, times: int) -> None:
    """Replays with changing inputs among `seats`, or alone where None; every result is checked."""
    if seats is None:
        context.fabric.solo()
        seats = (context.seat,)
    else:
        context.adopt(seats, epoch)
    me = context.seat
    for turn in range(times):
        _graphs["inp"].fill_(8 * turn + me + 1)
        _graphs["graph"].replay()
        torch.cuda.synchronize()
        context.device.check()
        rows = _graphs["rows"].view(context.fabric.capacity, -1).float()
        for seat in range(context.fabric.capacity):
            wanted = float(8 * turn + seat + 1) if seat in seats else 0.0
            assert bool((rows[seat] == wanted).all()), f"row {seat} of {seats}: {rows[seat][:4]}, not {wanted}"
        # Every member put the same rows into the reduce-scatter.
        assert bool((_graphs["mine"].float() == len(seats) * (8 * turn + me + 1)).all())
        assert bool((_graphs["total"].float() == sum(8 * turn + seat + 1 for seat in seats)).all())


def replay_until_it_fails(context: DeviceContext, seats: tuple[int, ...], epoch: int) -> Any:
    """(seconds of the replay that failed, its error, replays before it)."""
    context.adopt(seats, epoch)
    for replays in range(1_000_000):
        started = time.monotonic()
        _graphs["graph"].replay()
        torch.cuda.synchronize()
        try:
            context.device.check()
        except CollectiveError as error:
            return time.monotonic() - started, error, replays
    raise AssertionError("nothing failed")


def through_torch_distributed(context: DeviceContext, seats: tuple[int, ...], epoch: int) -> None:
    """The same contract as CPU tensors have, asked through torch's own functions."""
    if not dist.is_initialized():
        install_cuda_groups(context.fabric, context.device)
        install_backend(context.fabric)
        init_elastic(context.fabric, context.seat, context.fabric.capacity)
        _graphs["group"] = dist.new_group(list(range(context.fabric.capacity)), backend="nccl")
    context.adopt(seats, epoch)
    group, me, capacity = _graphs["group"], context.seat, context.fabric.capacity
    for device in ("cuda", "cpu"):
        ids = torch.full((capacity, 3), -7, dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(ids, torch.full((1, 3), me, dtype=torch.int64, device=device), group=group)
        assert ids.tolist() == [[seat if seat in seats else -7] * 3 for seat in range(capacity)]
        hidden = torch.full((capacity, 40), float("nan"), dtype=torch.bfloat16, device=device)
        dist.all_gather_into_tensor(hidden, torch.full((40,), me + 1.0, dtype=torch.bfloat16, device=device), group)
        assert hidden[:, 0].tolist() == [seat + 1.0 if seat in seats else 0.0 for seat in range(capacity)]
        out = torch.empty(40, dtype=torch.bfloat16, device=device)
        dist.reduce_scatter_tensor(out, hidden.view(-1), group=group)
        assert out.float().eq(len(seats) * (me + 1.0)).all()
        total = torch.full((5, 8), 1.0, device=device).t()  # not contiguous
        dist.all_reduce(total, group=group)
        assert total.eq(len(seats)).all() and total.shape == (8, 5)
        most = torch.tensor([me], device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        assert int(most) == seats[-1]
        told = torch.tensor([me * 10.0], device=device)
        dist.broadcast(told, src=seats[-1], group=group)
        assert float(told) == seats[-1] * 10.0
        rows = [torch.full((2,), 9.0, device=device) for _ in range(capacity)]
        dist.all_gather(rows, torch.full((2,), float(me), device=device), group=group)
        assert [float(row[0]) for row in rows] == [float(s) if s in seats else 0.0 for s in range(capacity)]
    dist.barrier(group)
    context.device.drain()
    context.device.check()
