"""`elasticmoe bench autoscale`: the policy against fixed sizes and an oracle, in a SIMULATION of larger machines.

With `--live` on a real server instead (live.py).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.policy import live
from benchmarks.policy.governors import Policy, best_plan
from benchmarks.policy.service import Machine, Outcome, Scheduled, Server
from benchmarks.policy.traces import KINDS, Request, Trace, make_trace, read_trace
from benchmarks.scaling.costs import H200
from benchmarks.scaling.report import table
from benchmarks.scaling.simulation import DecodeLoad, Weights
from benchmarks.scaling.workload import Lengths
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.model_shape import shape_of
from elasticmoe_sglang.policy.decision import Action, Decision
from elasticmoe_sglang.policy.settings import Autoscale, PolicySettings, Slo, parse_slo

_TEXT = "Policy against fixed sizes and an oracle on recorded or made loads"
_ROOT = Path(__file__).parents[2]
_DEFAULTS = {
    "slo": "ttft=1s,itl=40ms,attainment=0.9",
    "prompt_tokens": "lognormal:256-8192",
    "output_tokens": "lognormal:256-4096",
    "out": "benchmarks/results/autoscale",
}
_LIVE_DEFAULTS = {
    "slo": "ttft=1s,itl=200ms,attainment=0.9",
    "prompt_tokens": "16-64",
    "output_tokens": "24-72",
    "out": "benchmarks/results/autoscale-live",
}
_CONTEXT = 4096
_PEAK = 0.9
"""Peak of the made loads, of the rate that the largest size sustains."""
_SUSTAINED, _TRIAL_S, _ROUNDS = 0.97, 240.0, 8
_ATTAIN_SHARE, _COST_SHARE, _ORACLE_SHARE = 0.95, 0.7, 1.1


@dataclass(frozen=True)
class Scenario:
    """A model on H200, between two sizes. `hidden`: elements of a token's hidden state."""

    model: str
    hidden: int
    dtype: str
    largest: int
    prefill_rate: float


SCENARIOS = {
    "qwen3-30b-a3b-2": Scenario("qwen3-30b-a3b", 2048, "bfloat16", 2, 15000.0),
    "qwen3-30b-a3b-8": Scenario("qwen3-30b-a3b", 2048, "bfloat16", 8, 15000.0),
    "deepseek-v3-64": Scenario("deepseek-v3", 7168, "fp8_block128", 64, 15000.0),
}


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One governor on one trace; `use`: of the oracle's plan."""

    name: str
    attainment: float
    rank_seconds: float
    changes: int
    sizes: list[tuple[float, int]] = []
    use: float | None = None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """All runs on one trace, and the policy's decisions to act."""

    scenario: str
    trace: str
    duration_s: float
    requests: int
    sizes: tuple[int, int]
    runs: list[Run]
    actions: list[str]
    took_s: float


class Figures(msgspec.Struct, kw_only=True):
    """What is written as figures.json."""

    simulation: bool
    invocation: str
    slo: str
    prompt: str
    output: str
    seed: int
    results: list[Result]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command; its namespace carries `run`."""
    what = "A simulation: nothing is measured, unless it is told to play them --live"
    parser = commands.add_parser("autoscale", help=_TEXT, description=f"{_TEXT}. {what}.")
    parser.add_argument("--scenarios", nargs="+", choices=sorted(SCENARIOS), default=sorted(SCENARIOS, reverse=True))
    parser.add_argument("--traces", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--file", type=Path, help="a load of JSON lines {at, prompt_words, output_tokens}, beside these"
    )
    parser.add_argument("--slo", help=f"(default: {_DEFAULTS['slo']}; live: {_LIVE_DEFAULTS['slo']})")
    for name in ("prompt_tokens", "output_tokens"):
        told = f"(default: {_DEFAULTS[name]}; live: {_LIVE_DEFAULTS[name]})"
        parser.add_argument(f"--{name.replace('_', '-')}", help=told)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help=f"(default: {_DEFAULTS['out']}; live: {_LIVE_DEFAULTS['out']})")
    parser.add_argument("--resume", action="store_true", help="keep the results that the output folder has")
    live.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write and print the report; raises UserInputError for an impossible SLO, lengths or trace."""
    for name, value in (_LIVE_DEFAULTS if args.live else _DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, _ROOT / value if name == "out" else value)
    if args.live:
        return live.run(args, _invocation(sys.argv))
    slo = parse_slo(args.slo)
    prompt, output = Lengths.parse(args.prompt_tokens), Lengths.parse(args.output_tokens)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "figures.json"
    figures = Figures(
        simulation=True,
        invocation=_invocation(sys.argv),
        slo=str(slo),
        prompt=args.prompt_tokens,
        output=args.output_tokens,
        seed=args.seed,
        results=msgspec.json.decode(path.read_bytes(), type=Figures).results if args.resume and path.exists() else [],
    )
    done = {(result.scenario, result.trace) for result in figures.results}
    for name in args.scenarios:
        machine = make_machine(SCENARIOS[name])
        wanted = [kind for kind in args.traces if (name, kind) not in done]
        peak = _PEAK * sustained_rate(machine, slo, prompt, output) if wanted else 0.0
        traces = [make_trace(kind, peak, prompt, output, seed=args.seed) for kind in wanted]
        if args.file is not None:
            traces.append(read_trace(args.file))
        for trace in traces:
            print(
                f"elasticmoe bench: {name}, {trace.name}: {len(trace.requests)} requests", file=sys.stderr, flush=True
            )
            figures.results.append(compare(name, machine, trace, slo))
            path.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=1) + b"\n")
    report = markdown(figures)
    (args.out / "report.md").write_text(report)
    print(report)
    return 0


def _invocation(argv: Sequence[str]) -> str:
    words = argv[argv.index("autoscale") :] if "autoscale" in argv else ["autoscale"]
    return shlex.join(["elasticmoe", "bench", *(word for word in words if word != "--resume")])


def make_machine(scenario: Scenario) -> Machine:
    shape = shape_of(json.loads((_ROOT / "configs" / "models" / f"{scenario.model}.json").read_text()))
    weights = Weights(
        columns=shape.experts, column_bytes=shape.column_bytes(scenario.dtype), dense_bytes=shape.dense_bytes()
    )
    load = DecodeLoad(
        kv_bytes=shape.kv_bytes_per_token(),
        context=_CONTEXT,
        exchange_bytes=2 * 8 * scenario.hidden * 2,
        layers=shape.moe_layers,
    )
    return Machine(H200, weights, load, scenario.prefill_rate, scenario.largest)


def sustained_rate(machine: Machine, slo: Slo, prompt: Lengths, output: Lengths) -> float:
    """Requests a second that the largest size serves within the SLO for four minutes. Raises UserInputError."""
    lengths = make_trace("steady", 200.0, prompt, output, seed=1).requests[:2000]
    mean = sum(request.output_tokens for request in lengths) / len(lengths)
    low, high = 0.0, 1.2 * machine.capacity(machine.largest, slo) / mean
    for _ in range(_ROUNDS):
        rate = (low + high) / 2
        # The steady trace is half of its peak.
        made = make_trace("steady", 2 * rate, prompt, output, seed=1)
        cut: tuple[Request, ...] = tuple(request for request in made.requests if request.at < _TRIAL_S)
        trace = Trace(name="sustained", duration_s=_TRIAL_S, requests=cut)
        attained = Server(machine, trace, slo, Scheduled(), machine.largest).run().attainment
        low, high = (rate, high) if attained >= _SUSTAINED else (low, rate)
    if not low:
        raise UserInputError(f"{machine.largest} ranks meet the SLO {slo} at no rate", hint="Give a weaker one")
    return low


def compare(scenario: str, machine: Machine, trace: Trace, slo: Slo) -> Result:
    """All governors on one trace. The policy starts in the middle, as somebody who does not know the load would."""
    started = time.monotonic()
    smallest, largest = machine.smallest(), machine.largest
    middle = (smallest + largest) // 2
    fixed = {
        name: Server(machine, trace, slo, Scheduled(), size).run()
        for name, size in (("smallest fixed", smallest), ("largest fixed", largest))
    }
    runs = [_as_run(name, outcome) for name, outcome in fixed.items()]
    actions: list[str] = []
    attained = 0.0
    for name, forecast in (("policy", True), ("policy without forecast", False)):
        settings = PolicySettings(slo=str(slo), autoscale=Autoscale.ON, min_ep_size=smallest, forecast=forecast)
        policy = Policy(settings, largest)
        outcome = Server(machine, trace, slo, policy, middle).run()
        runs.append(_as_run(name, outcome))
        if forecast:
            attained = outcome.attainment
            actions = [_told(decision) for decision in policy.decisions if decision.action is not Action.NOTHING]
    best = best_plan(machine, trace, slo, smallest, fixed["largest fixed"].produced, attained)
    if best is not None:
        runs.append(_as_run("oracle", best.outcome, use=best.use))
    return Result(
        scenario=scenario,
        trace=trace.name,
        duration_s=trace.duration_s,
        requests=len(trace.requests),
        sizes=(smallest, largest),
        runs=runs,
        actions=actions,
        took_s=time.monotonic() - started,
    )


def _as_run(name: str, outcome: Outcome, use: float | None = None) -> Run:
    return Run(
        name=name,
        attainment=outcome.attainment,
        rank_seconds=outcome.rank_seconds,
        changes=len(outcome.sizes) - 1,
        sizes=outcome.sizes,
        use=use,
    )


def _told(decision: Decision) -> str:
    return f"{decision.at:.0f} s: {decision.ranks} -> {decision.desired}, because {decision.because}"


# -- the report -------------------------------------------------------------------------------------------------------


def markdown(figures: Figures) -> str:
    """Every number in it is computed from the runs."""
    parts = [
        "# SIMULATION: the policy against fixed sizes and an oracle",
        f"Written by `{figures.invocation}`. Nothing here was measured on H200: requests wait, prefill and decode in a "
        "model fed with the costs of `elasticmoe bench simulate`; the policy is the project's own code. Definitions: "
        "docs/policy.md.",
        f"- SLO: {figures.slo}\n- prompts of {figures.prompt} tokens, outputs of {figures.output}; seed {figures.seed}",
        runs_table(figures.results),
        "## Targets\n\n" + targets_table(figures.results),
    ]
    return "\n\n".join(parts) + "\n"


def runs_table(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        most = _named(result, "largest fixed").rank_seconds
        for run_ in result.runs:
            rows.append(
                [
                    f"{result.scenario} ({result.sizes[0]} to {result.sizes[1]})",
                    f"{result.trace}, {result.requests} requests in {result.duration_s:.0f} s",
                    run_.name,
                    f"{run_.attainment:.1%}",
                    f"{run_.rank_seconds:.0f}",
                    f"{run_.rank_seconds / most:.2f}",
                    str(run_.changes),
                ]
            )
    header = ["machine", "load", "size chosen by", "attainment", "rank-seconds", "of the largest's", "changes"]
    return table(header, rows)


def targets_table(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        policy, most = _named(result, "policy"), _named(result, "largest fixed")
        oracle = next((run_ for run_ in result.runs if run_.name == "oracle"), None)
        attained = policy.attainment / most.attainment if most.attainment else 1.0
        share = policy.rank_seconds / most.rank_seconds
        over = None if oracle is None else policy.rank_seconds / oracle.rank_seconds
        rows.append(
            [
                result.scenario,
                result.trace,
                _judged(f"{attained:.3f}", attained >= _ATTAIN_SHARE),
                _judged(f"{share:.3f}", share <= _COST_SHARE),
                "no plan attains as much" if over is None else _judged(f"{over:.3f}", over <= _ORACLE_SHARE),
            ]
        )
    header = [
        "machine", "load", f"attainment over the largest's (target {_ATTAIN_SHARE})",
        f"rank-seconds over the largest's (target {_COST_SHARE})", f"over the oracle's (target {_ORACLE_SHARE})",
    ]  # fmt: skip
    return table(header, rows)


def _judged(text: str, met: bool) -> str:
    return text if met else f"{text} **missed**"


def _named(result: Result, name: str) -> Run:
    return next(run_ for run_ in result.runs if run_.name == name)
