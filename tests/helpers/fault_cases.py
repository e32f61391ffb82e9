"""What the workers of the collectives' fault tests do."""

from __future__ import annotations

import random
import time

import torch
import torch.distributed as dist

from tests.helpers.workers import WorkerContext


def add_up(context: WorkerContext, ranks: tuple[int, ...], epoch: int, delay_s: float = 0.0) -> int:
    context.adopt(ranks, epoch)
    time.sleep(delay_s)
    total = torch.tensor([context.rank + 1])
    dist.all_reduce(total, group=context.memo["group"])
    return int(total)


def endless(context: WorkerContext, ranks: tuple[int, ...], epoch: int, name: str) -> None:
    """Collectives without end: whatever happens, happens in the middle of one."""
    context.adopt(ranks, epoch)
    group = context.memo["group"]
    values = torch.ones(40_000)
    rows = torch.zeros(4 * values.numel())
    while True:
        if name == "all_reduce":
            dist.all_reduce(values, group=group)
        elif name == "all_gather":
            dist.all_gather_single(rows, values, group=group)
        elif name == "broadcast":
            dist.broadcast(values, src=0, group=group)
        elif name == "reduce_scatter":
            dist.reduce_scatter_single(torch.empty(40_000), rows, group=group)
        elif name == "small":
            dist.all_reduce(values[:2], group=group)
        else:
            dist.barrier(group=group)


def many_steps(context: WorkerContext, ranks: tuple[int, ...], epoch: int, steps: int, seed: int) -> list[int]:
    """Many small collectives in two groups with random pauses, each checked; returns all sums."""
    context.adopt(ranks, epoch)
    group = context.memo["group"]
    chance = random.Random(seed * 31 + context.rank)
    sums = []
    for step in range(steps):
        if chance.random() < 0.1:
            time.sleep(chance.random() * 2e-3)
        total = torch.tensor([(context.rank + 1) * (step + 1)])
        dist.all_reduce(total, group=group if step % 3 else None)
        rows = torch.full((4,), -1, dtype=torch.int64)
        dist.all_gather_single(rows, torch.tensor([step * 10 + context.rank]), group=group)
        assert rows.tolist() == [step * 10 + rank if rank in ranks else -1 for rank in range(4)], (step, rows)
        assert int(total) == sum(rank + 1 for rank in ranks) * (step + 1), step
        sums.append(int(total))
    return sums


def cpu_seconds_while_waiting(context: WorkerContext, epoch: int) -> float:
    started = time.process_time()
    add_up(context, (0, 1), epoch)
    return time.process_time() - started


def late_rank_barriers(context: WorkerContext, ranks: tuple[int, ...], epoch: int, steps: int) -> None:
    """The last rank comes a millisecond late to every barrier, so the others sleep in every one."""
    context.adopt(ranks, epoch)
    for _ in range(steps):
        if context.rank == ranks[-1]:
            time.sleep(1e-3)
        dist.barrier(group=context.memo["group"])
