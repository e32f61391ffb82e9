"""What copies of busy expert columns save: one MoE layer on its fullest rank, with popularity 1/rank.

    python benchmarks/redundant_experts.py [--repetitions 5] [--out benchmarks/results/rebalance/copies-cpu.json]

Columns as they begin, moved by load, and moved and copied by load. The load is that of one drawing of tokens, the
batches are others. Each rank's part of each batch is computed by itself, ids to slots included; the layer is done when
the slowest rank is. Arrangements take turns within a repetition, so that all see the same machine. Times are those of
CUDA graph replays on a GPU, and processor time of the one thread that computes on the CPU. Balance is counted, not
timed: pairs on the fullest rank over the mean.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

import torch

from benchmarks.scaling.machine import describe
from elasticmoe_kernels import moe_experts
from elasticmoe_kernels.reference.route import turns_of_rows
from elasticmoe_sglang.planner import TURNS, Placement, imbalance, initial_placement
from elasticmoe_sglang.planner.rebalance import balanced
from elasticmoe_sglang.worker.weights import slots_by_turn

_OBSERVED = 20_000
"""Tokens whose routing is the load that columns are placed by."""
_CALLS = 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer and its ranks. tokens: of a batch, over all ranks."""

    experts: int
    ranks: int
    hidden: int
    inter: int
    top_k: int
    tokens: int


CASES = {
    "cpu": (
        Case(experts=64, ranks=4, hidden=256, inter=128, top_k=4, tokens=2048),
        Case(experts=64, ranks=8, hidden=256, inter=128, top_k=4, tokens=2048),
        Case(experts=128, ranks=16, hidden=256, inter=128, top_k=4, tokens=4096),
    ),
    # Qwen3-30B-A3B's shape on 8 and 16 ranks, DeepSeek-V3's number of experts on 32, with a quarter of its width.
    "cuda": (
        Case(experts=128, ranks=8, hidden=2048, inter=768, top_k=8, tokens=4096),
        Case(experts=128, ranks=16, hidden=2048, inter=768, top_k=8, tokens=4096),
        Case(experts=256, ranks=32, hidden=1792, inter=512, top_k=8, tokens=8192),
    ),
}


def draw(case: Case, tokens: int, seed: int) -> torch.Tensor:
    """Distinct expert ids [tokens, top_k], popularity 1 / rank over experts that are always shuffled alike."""
    generator = torch.Generator().manual_seed(seed)
    scores = -torch.log(torch.rand(tokens, case.experts, generator=generator))
    shuffled = torch.randperm(case.experts, generator=torch.Generator().manual_seed(7))
    # The smallest of exponentials with rate p: sampling without replacement with weights p.
    return (scores * (1 + shuffled.float())).topk(case.top_k, largest=False).indices


def arrangements(case: Case) -> dict[str, Placement]:
    """By name, from the load of tokens that no batch has."""
    load = torch.bincount(draw(case, _OBSERVED, 0).flatten(), minlength=case.experts).tolist()
    ranks = range(case.ranks)
    start = initial_placement(case.experts, ranks)
    found = {"as they begin": start, "moved": balanced(start, ranks, load)}
    found["copied"] = balanced(start, ranks, load, redundant=case.ranks)
    for name, placement in found.items():
        print(f"  {name}: {len(placement.copies)} copies, expected {imbalance(placement, ranks, load):.3f} x the mean")
    return found


def table_of(placement: Placement, rank: int, turns: int, device: str) -> torch.Tensor:
    """int32 [turns, experts + 1]: the rank's slots."""
    shape = (turns, placement.num_columns + 1)
    return slots_by_turn(shape, placement.columns_of(rank), placement.shared_by(rank)).to(device)


class Layer:
    """The weights of a case's layer and the parts of a batch."""

    def __init__(self, case: Case, device: str) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        torch.manual_seed(1)
        self.case, self.device = case, device
        self.w13 = torch.randn(case.experts, 2 * case.inter, case.hidden, device=device, dtype=dtype)
        self.w2 = torch.randn(case.experts, case.hidden, case.inter, device=device, dtype=dtype)
        self.x = torch.randn(case.tokens, case.hidden, device=device, dtype=dtype)
        self.weights = torch.rand(case.tokens, case.top_k, device=device)
        self._control = torch.zeros(256, dtype=torch.int64, device=device)
        self._turns = turns_of_rows(case.tokens, None, TURNS)[:, None]
        self._timer: Any = None

    def slots(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        if self.device == "cpu":
            return table[0][ids] if table.shape[0] == 1 else table[self._turns, ids]
        from elasticmoe_kernels.triton.slots import slots_of_rows

        return slots_of_rows(ids, table, control=self._control.data_ptr(), rows_per_rank=None)

    def part(self, ids: torch.Tensor, table: torch.Tensor) -> Callable[[], object]:
        return lambda: moe_experts(self.x, self.w13, self.w2, self.slots(ids, table), self.weights)

    def times_us(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Of each call, the median of some in which all take turns."""
        if self.device == "cuda":
            sys.path.insert(0, str(Path(__file__).parent))
            from moe_timing import Timer

            self._timer = self._timer or Timer()
            times: list[float] = self._timer.together([[call] for call in calls], target_ms=1.0, samples=5, warm_ms=1.0)
            return times
        found: list[list[float]] = [[] for _ in calls]
        for _ in range(_CALLS):
            for call, samples in zip(calls, found, strict=True):
                began = time.thread_time()
                call()
                samples.append((time.thread_time() - began) * 1e6)
        return [statistics.median(samples) for samples in found]


def measure(case: Case, device: str, repetitions: int) -> dict[str, Any]:
    """Figures of all arrangements; each repetition is another batch."""
    print(case)
    layer, placed = Layer(case, device), arrangements(case)
    rows: dict[str, dict[str, Any]] = {
        name: {"copies": len(placement.copies), "balance": [], "slowest_us": [], "mean_us": []}
        for name, placement in placed.items()
    }
    tables = {
        name: [table_of(each, rank, TURNS if each.copies else 1, device) for rank in range(case.ranks)]
        for name, each in placed.items()
    }
    for repetition in range(repetitions):
        ids = draw(case, case.tokens, 1 + repetition).to(device)
        calls = []
        for name in placed:
            found = torch.stack([layer.slots(ids, table) for table in tables[name]])
            assert bool(((found >= 0).sum(0) == 1).all()), "a pair is computed twice, or not at all"
            pairs = (found >= 0).sum((1, 2)).tolist()
            rows[name]["balance"].append(max(pairs) * case.ranks / sum(pairs))
            calls += [layer.part(ids, table) for table in tables[name]]
        times = layer.times_us(calls)
        for index, row in enumerate(rows.values()):
            ranks = times[index * case.ranks : (index + 1) * case.ranks]
            row["slowest_us"].append(round(max(ranks), 1))
            row["mean_us"].append(round(statistics.mean(ranks), 1))
    base = rows["moved"]["slowest_us"]
    for name, row in rows.items():
        row["faster_than_moved"] = [round(b / own, 3) for b, own in zip(base, row["slowest_us"], strict=True)]
        row["balance"] = [round(each, 3) for each in row["balance"]]
        print(f"  {name}: balance {_spread(row['balance'])}, slowest rank {_spread(row['slowest_us'])} us, "
              f"{_spread(row['faster_than_moved'])} x the speed of moved")  # fmt: skip
    return {"case": vars(case), "arrangements": rows}


def lookup_us(case: Case, device: str, repetitions: int) -> dict[str, list[float]]:
    """Ids to slots by a table with one turn and with all of them, the rest being equal."""
    layer = Layer(case, device)
    start = initial_placement(case.experts, range(case.ranks))
    ids = draw(case, case.tokens, 1).to(device)
    tables = [table_of(start, 0, turns, device) for turns in (1, TURNS)]
    calls = [lambda table=table: layer.slots(ids, table) for table in tables]  # type: ignore[misc]
    times = [layer.times_us(calls) for _ in range(repetitions)]
    return {"one turn": [round(t[0], 2) for t in times], f"{TURNS} turns": [round(t[1], 2) for t in times]}


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):g} [{min(values):g}, {max(values):g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(CASES), default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = CASES[args.device]
    with torch.inference_mode():
        points = [measure(case, args.device, args.repetitions) for case in cases]
        lookups = lookup_us(cases[0], args.device, args.repetitions)
    print("ids to slots:", {name: _spread(times) for name, times in lookups.items()})
    machine = describe() | ({"gpu": torch.cuda.get_device_name()} if args.device == "cuda" else {})
    if args.out is not None:
        figures = {"machine": machine, "repetitions": args.repetitions, "points": points, "lookup_us": lookups}
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
