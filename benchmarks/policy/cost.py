"""`elasticmoe bench policy-cost`: what measuring and deciding cost a core, at a given rate of requests."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.scaling import machine
from elasticmoe_sglang.policy.decision import PolicyState, decide
from elasticmoe_sglang.policy.estimator import Estimator, Sample
from elasticmoe_sglang.policy.meter import RequestMeter
from elasticmoe_sglang.policy.settings import PolicySettings

_TEXT = "CPU time of the policy's measuring and deciding"
_ROOT = Path(__file__).parents[2]
_SLO = "ttft=1s,itl=50ms,attainment=0.9"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command; its namespace carries `run`."""
    parser = commands.add_parser("policy-cost", help=_TEXT, description=f"{_TEXT}, by replaying events of a server.")
    parser.add_argument("--rate", type=int, default=1000, help="requests a second (default: %(default)s)")
    parser.add_argument("--output-tokens", type=int, default=64, help="of a request (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=8, help="each sends its batches (default: %(default)s)")
    parser.add_argument("--itl", type=float, default=0.025, help="seconds between batches (default: %(default)g)")
    parser.add_argument("--seconds", type=int, default=20, help="of load in one round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results" / "policy-cost.json")
    parser.set_defaults(run=run)


class _Load:
    """Requests that arrive evenly, and the batches of output that they are in, for one second after the other."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._open: list[dict[str, int]] = [{} for _ in range(args.ranks)]
        self._number = 0

    def second(self, start: float) -> list[tuple[float, list[str], list[tuple[Any, ...]]]]:
        """Of each step of the ranks: time, arriving requests, and the arguments of the batches' outputs."""
        args, steps = self._args, round(1 / self._args.itl)
        made = []
        for step in range(steps):
            at = start + step / steps
            arriving = []
            for _ in range(args.rate * (step + 1) // steps - args.rate * step // steps):
                rid = f"{self._number:032x}"
                arriving.append(rid)
                self._open[self._number % args.ranks][rid] = 0
                self._number += 1
            made.append((at, arriving, [self._batch(lengths) for lengths in self._open]))
        return made

    def _batch(self, lengths: dict[str, int]) -> tuple[Any, ...]:
        rids = list(lengths)
        for rid in rids:
            lengths[rid] += 1
        counts = [lengths[rid] for rid in rids]
        reasons = [{"type": "length"} if count == self._args.output_tokens else None for count in counts]
        for rid, reason in zip(rids, reasons, strict=True):
            if reason is not None:
                del lengths[rid]
        return rids, [[7]] * len(rids), counts, reasons

    @property
    def running(self) -> int:
        return sum(map(len, self._open))


def measure(args: argparse.Namespace) -> tuple[float, float]:
    """One round: CPU seconds a second spent where SGLang's tokenizer runs, and in the controller."""
    meter, estimator, state = RequestMeter(), Estimator(), PolicyState()
    settings, load = PolicySettings(slo=_SLO), _Load(args)
    estimator.slo = settings.objective or estimator.slo
    warm = round(args.output_tokens * args.itl) + 2
    hook_s = controller_s = 0.0
    for second in range(warm + args.seconds):
        steps = load.second(float(second))
        began = time.thread_time()
        for at, arriving, batches in steps:
            for rid in arriving:
                meter.arrived(at, rid, 512, True)
            for batch in batches:
                if batch[0]:
                    meter.output(at, *batch)
        middle = time.thread_time()
        now = float(second + 1)
        meter.drain(now, estimator)
        estimator.sampled(now, Sample(ranks=args.ranks, running=load.running, waiting=0, kv_use=0.5, slots=256))
        snapshot = estimator.snapshot(now, settings)
        estimator.latencies(now)
        if snapshot is not None:
            estimator.demand.expected(now, 10.0)
            _, state = decide(snapshot, settings, state, now, max_ep_size=2 * args.ranks)
        if second >= warm:
            hook_s += middle - began
            controller_s += time.thread_time() - middle
    return hook_s / args.seconds, controller_s / args.seconds


def run(args: argparse.Namespace) -> int:
    """Measure, write and print; 0 whatever it says."""
    measure(args)  # a process that has just started takes longer
    rounds = [measure(args) for _ in range(args.rounds)]
    totals = [sum(parts) for parts in rounds]
    found = {
        "command": f"elasticmoe bench policy-cost --rate {args.rate} --output-tokens {args.output_tokens} "
        f"--ranks {args.ranks} --itl {args.itl:g} --seconds {args.seconds} --rounds {args.rounds}",
        "machine": machine.describe(),
        "rate": args.rate,
        "output_tokens": args.output_tokens,
        "ranks": args.ranks,
        "rounds": args.rounds,
        "warm_up_rounds": 1,
        "share_of_a_core": _spread(totals),
        "of_it_in_the_tokenizer": _spread([part for part, _ in rounds]),
        "of_it_in_the_coordinator": _spread([part for _, part in rounds]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    print(args.out.read_text())
    return 0


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "n": len(values)}
