"""The elastic process group compared with gloo on this machine's CPU, both in one run, as ratios.

    python benchmarks/collectives.py [--ranks 2 4] [--out benchmarks/results/collectives-cpu.json]

The same processes run both, in turns, on the same tensors through `torch.distributed`; each figure is the median over
the turns of the mean time per call on the slowest rank, next to it the best turn (other work on the machine moves the
median). Also measured: the cost of inactive ranks (capacity 8 with 2 active against capacity 2), and a commit through
the commit barrier.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from benchmarks.scaling.machine import describe
from elasticmoe_sglang.comm.commit_barrier import CommitBarrier, Decision
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.planner import Placement, View
from tests.helpers.workers import WorkerContext, WorkerPool

TURNS = 7
SECONDS_A_TURN = 0.15

KIB = 1 << 10
CASES: tuple[tuple[str, int], ...] = (
    ("barrier", 0),
    ("scheduler sync (9 int64 per rank)", 72),
    ("broadcast", 8),
    ("broadcast", 16 * KIB),
    ("all_gather", 4 * KIB),
    ("all_gather", 64 * KIB),
    ("all_gather", 1024 * KIB),
    ("all_reduce", 4 * KIB),
    ("all_reduce", 64 * KIB),
    ("all_reduce", 1024 * KIB),
    ("all_reduce", 8192 * KIB),
    ("reduce_scatter", 4 * KIB),
    ("reduce_scatter", 256 * KIB),
)


def _call(name: str, nbytes: int, group: Any) -> Callable[[], object]:
    """One collective on `nbytes` bytes of float32 per rank."""
    size = dist.get_world_size(group)
    count = max(nbytes // 4, 1)
    mine = torch.ones(count)
    if name == "barrier":
        return lambda: dist.barrier(group=group)
    if name.startswith("scheduler sync"):
        row, rows = torch.ones(9, dtype=torch.int64), torch.zeros(9 * size, dtype=torch.int64)
        return lambda: dist.all_gather_single(rows, row, group=group)
    if name == "broadcast":
        return lambda: dist.broadcast(mine, src=0, group=group)
    if name == "all_gather":
        gathered = torch.empty(count * size)
        return lambda: dist.all_gather_single(gathered, mine, group=group)
    if name == "all_reduce":
        return lambda: dist.all_reduce(mine, op=dist.ReduceOp.SUM, group=group)
    everything, part = torch.ones(count * size), torch.empty(count)
    assert name == "reduce_scatter"
    return lambda: dist.reduce_scatter_single(part, everything, group=group)


def _gloo(context: WorkerContext, size: int) -> Any:
    """A gloo group of all ranks, registered by hand: torch would ask the elastic default group for it."""
    if "gloo" not in context.memo:
        store = dist.FileStore(os.path.join(context.scratch, "gloo"), size)
        group = dist.ProcessGroup(store, context.rank, size)
        backend = dist.ProcessGroupGloo(store, context.rank, size, timedelta(seconds=60))
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        group._set_group_name("gloo-beside")
        from torch.distributed.distributed_c10d import _world

        _world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
        context.memo["gloo"] = group
    return context.memo["gloo"]


def measure(
    context: WorkerContext, ranks: tuple[int, ...], epoch: int, name: str, nbytes: int, kind: str, calls: int
) -> float:
    """Mean seconds per call."""
    context.adopt(ranks, epoch)
    ours = context.memo["group"]
    call = _call(name, nbytes, ours if kind == "elastic" else _gloo(context, len(ranks)))
    for _ in range(max(3, calls // 20)):
        call()
    dist.barrier(group=ours)
    started = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - started) / calls


def commits(context: WorkerContext, first_epoch: int, count: int, ranks: tuple[int, ...]) -> list[float]:
    """Seconds from arrival at the commit barrier to the new membership, with all participants ready."""
    barrier = CommitBarrier(context.region.control, context.rank)
    times = []
    for epoch in range(first_epoch, first_epoch + count):
        time.sleep(2e-3)
        membership = Membership(ranks=ranks, epoch=epoch, capacity=context.region.capacity)
        view = View(membership=membership, placement=Placement(owners=ranks))
        started = time.perf_counter()
        decision = barrier.arrive(epoch=epoch, participants=ranks, view=view, timeout_s=20)
        assert decision is Decision.COMMIT, barrier.reason
        context.region.set_membership(membership)
        times.append(time.perf_counter() - started)
    return times


@contextmanager
def _pool(capacity: int, ranks: tuple[int, ...]) -> Iterator[WorkerPool]:
    with tempfile.TemporaryDirectory() as scratch:
        pool = WorkerPool(capacity, ranks=ranks, scratch=scratch, timeout_s=60, channels=2)
        try:
            yield pool
        finally:
            pool.close()


def _slowest(pool: WorkerPool, ranks: tuple[int, ...], *args: Any) -> float:
    return max(pool.run(ranks, measure, ranks, 0, *args).values())


def _turns(
    pool: WorkerPool, ranks: tuple[int, ...], name: str, nbytes: int, kinds: tuple[str, ...]
) -> dict[str, tuple[float, float]]:
    """(median, best) microseconds a call of each kind, measured in turns."""
    calls = {}
    for kind in kinds:
        once = _slowest(pool, ranks, name, nbytes, kind, 5)
        calls[kind] = max(5, min(3000, int(SECONDS_A_TURN / once)))
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(TURNS):
        for kind in kinds:
            times[kind].append(_slowest(pool, ranks, name, nbytes, kind, calls[kind]))
    return {kind: (statistics.median(values) * 1e6, min(values) * 1e6) for kind, values in times.items()}


def against_gloo(size: int) -> list[dict[str, Any]]:
    ranks = tuple(range(size))
    rows = []
    with _pool(size, ranks) as pool:
        for name, nbytes in CASES:
            micros = _turns(pool, ranks, name, nbytes, ("elastic", "gloo"))
            (ours, our_best), (theirs, their_best) = micros["elastic"], micros["gloo"]
            row = {
                "ranks": size,
                "collective": name,
                "bytes": nbytes,
                "elastic_us": round(ours, 1),
                "gloo_us": round(theirs, 1),
                "times_faster": round(theirs / ours, 2),
                "elastic_best_us": round(our_best, 1),
                "gloo_best_us": round(their_best, 1),
                "times_faster_best": round(their_best / our_best, 2),
            }
            rows.append(row)
            print(
                f"{size} ranks  {name:32} {nbytes:>9} B  {ours:9.1f} us (best {our_best:9.1f})  "
                f"gloo {theirs:9.1f} us (best {their_best:9.1f})  "
                f"x{row['times_faster']} (best x{row['times_faster_best']})",
                flush=True,
            )
    return rows


def cost_of_capacity() -> list[dict[str, Any]]:
    """The same two ranks at capacity 2 and at capacity 8."""
    ranks = (0, 1)
    rows = []
    with _pool(2, ranks) as exact, _pool(8, ranks) as roomy:
        for name, nbytes in (("all_gather", 4 * KIB), ("all_gather", 64 * KIB), ("all_reduce", 64 * KIB)):
            pairs = []
            for _ in range(3):
                tight = _turns(exact, ranks, name, nbytes, ("elastic",))["elastic"][1]
                pairs.append((tight, _turns(roomy, ranks, name, nbytes, ("elastic",))["elastic"][1]))
            tight, wide = (min(column) for column in zip(*pairs, strict=True))
            rows.append(
                {
                    "collective": name,
                    "bytes": nbytes,
                    "capacity_2_us": round(tight, 1),
                    "capacity_8_us": round(wide, 1),
                    "ratio": round(wide / tight, 2),
                }
            )
            print(f"2 active  {name} {nbytes} B: capacity 8 takes {wide / tight:.2f} x capacity 2", flush=True)
    return rows


def commit_times(size: int) -> dict[str, Any]:
    ranks = tuple(range(size))
    with _pool(size, ranks) as pool:
        results = pool.run(ranks, commits, 1, 100, ranks)
    # Members arrive a little apart; the last one shows what the commit barrier itself takes.
    barrier = [min(column) * 1e3 for column in zip(*results.values(), strict=True)]
    row = {
        "ranks": size,
        "commits": len(barrier),
        "median_ms": round(statistics.median(barrier), 3),
        "max_ms": max(barrier),
    }
    row["max_ms"] = round(row["max_ms"], 3)
    print(f"barrier, {size} ranks: {row['median_ms']} ms median, {row['max_ms']} ms at most", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "machine": describe(),
        "against_gloo": [row for size in arguments.ranks for row in against_gloo(size)],
        "cost_of_capacity": cost_of_capacity(),
        "barrier": [commit_times(size) for size in arguments.ranks],
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
