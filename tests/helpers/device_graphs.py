"""Graphs and torch.distributed over the windows: what the ranks of `device_workers.py` do on a GPU."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from elasticmoe_kernels.triton import collectives
from elasticmoe_sglang.comm.cuda_group import install_cuda_groups
from elasticmoe_sglang.comm.process_group import init_elastic, install_backend
from elasticmoe_sglang.errors import CollectiveError
from tests.helpers.device_workers import DeviceContext

_graphs: dict[str, Any] = {}


def capture_alone(context: DeviceContext, count: int) -> None:
    """A graph of a layer's collectives, captured while nobody else takes part."""
    context.region.solo()
    device, group, capacity = context.device, context.everybody, context.region.capacity
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


def replay_together(context: DeviceContext, ranks: tuple[int, ...] | None, epoch: int, times: int) -> None:
    """Replays with changing inputs among `ranks`, or alone where None; every result is checked."""
    if ranks is None:
        context.region.solo()
        ranks = (context.rank,)
    else:
        context.adopt(ranks, epoch)
    me = context.rank
    for turn in range(times):
        _graphs["inp"].fill_(8 * turn + me + 1)
        _graphs["graph"].replay()
        torch.cuda.synchronize()
        context.device.check()
        rows = _graphs["rows"].view(context.region.capacity, -1).float()
        for rank in range(context.region.capacity):
            wanted = float(8 * turn + rank + 1) if rank in ranks else 0.0
            assert bool((rows[rank] == wanted).all()), f"row {rank} of {ranks}: {rows[rank][:4]}, not {wanted}"
        # Every member put the same rows into the reduce-scatter.
        assert bool((_graphs["mine"].float() == len(ranks) * (8 * turn + me + 1)).all())
        assert bool((_graphs["total"].float() == sum(8 * turn + rank + 1 for rank in ranks)).all())


def replay_until_it_fails(context: DeviceContext, ranks: tuple[int, ...], epoch: int) -> Any:
    """(seconds of the replay that failed, its error, replays before it)."""
    context.adopt(ranks, epoch)
    for replays in range(1_000_000):
        started = time.monotonic()
        _graphs["graph"].replay()
        torch.cuda.synchronize()
        try:
            context.device.check()
        except CollectiveError as error:
            return time.monotonic() - started, error, replays
    raise AssertionError("nothing failed")


def through_torch_distributed(context: DeviceContext, ranks: tuple[int, ...], epoch: int) -> None:
    """The same contract as CPU tensors have, asked through torch's own functions."""
    if not dist.is_initialized():
        install_cuda_groups(context.region, context.device)
        install_backend(context.region)
        init_elastic(context.region, context.rank, context.region.capacity)
        _graphs["group"] = dist.new_group(list(range(context.region.capacity)), backend="nccl")
    context.adopt(ranks, epoch)
    group, me, capacity = _graphs["group"], context.rank, context.region.capacity
    for device in ("cuda", "cpu"):
        ids = torch.full((capacity, 3), -7, dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(ids, torch.full((1, 3), me, dtype=torch.int64, device=device), group=group)
        assert ids.tolist() == [[rank if rank in ranks else -7] * 3 for rank in range(capacity)]
        hidden = torch.full((capacity, 40), float("nan"), dtype=torch.bfloat16, device=device)
        dist.all_gather_into_tensor(hidden, torch.full((40,), me + 1.0, dtype=torch.bfloat16, device=device), group)
        assert hidden[:, 0].tolist() == [rank + 1.0 if rank in ranks else 0.0 for rank in range(capacity)]
        out = torch.empty(40, dtype=torch.bfloat16, device=device)
        dist.reduce_scatter_tensor(out, hidden.view(-1), group=group)
        assert out.float().eq(len(ranks) * (me + 1.0)).all()
        total = torch.full((5, 8), 1.0, device=device).t()  # not contiguous
        dist.all_reduce(total, group=group)
        assert total.eq(len(ranks)).all() and total.shape == (8, 5)
        most = torch.tensor([me], device=device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        assert int(most) == ranks[-1]
        told = torch.tensor([me * 10.0], device=device)
        dist.broadcast(told, src=ranks[-1], group=group)
        assert float(told) == ranks[-1] * 10.0
        rows = [torch.full((2,), 9.0, device=device) for _ in range(capacity)]
        dist.all_gather(rows, torch.full((2,), float(me), device=device), group=group)
        assert [float(row[0]) for row in rows] == [float(s) if s in ranks else 0.0 for s in range(capacity)]
    dist.barrier(group)
    dist.distributed_c10d._add_ephemeral_timeout_for_all_pgs(timedelta(seconds=1))  # as Inductor's cache does
    context.device.drain()
    context.device.check()
