"""`elasticmoe bench`: one command per experiment; also `python -m benchmarks.scaling.main`."""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from benchmarks.scaling import machine, page
from benchmarks.scaling.analyser import analyse
from benchmarks.scaling.experiments import COMMANDS, Defaults, Experiment
from benchmarks.scaling.figures import Slo
from benchmarks.scaling.methods import METHODS, MethodFailed
from benchmarks.scaling.plots import draw
from benchmarks.scaling.records import RunLog, read_log, write_log
from benchmarks.scaling.report import Result, Results, compare_outputs, describe_workload, markdown, targets
from benchmarks.scaling.runner import run
from benchmarks.server import ServerFailed
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.tiny_model import make_tiny_model

_RESULTS = Path(__file__).parents[1] / "results"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elasticmoe bench",
        description="Measure what a change of size costs, compared with what users do today. Runs real servers.",
    )
    commands = parser.add_subparsers(dest="command", metavar="EXPERIMENT", required=True)
    for name, defaults in COMMANDS.items():
        sub = commands.add_parser(name, help=defaults.title, description=f"{defaults.title}. {defaults.paper}.")
        _add_arguments(sub, name, defaults)
    from benchmarks.policy import autoscale, cost
    from benchmarks.scaling import simulation_command

    for command in (simulation_command, autoscale, cost):
        command.add_parser(commands)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, name: str, d: Defaults) -> None:
    what = parser.add_argument_group("what is measured")
    what.add_argument("--methods", type=_names, default=d.methods, help=f"out of {','.join(METHODS)}")
    what.add_argument("--start", type=int, default=d.start, help="first size (default: %(default)s)")
    what.add_argument("--changes", default=d.changes, help="SECOND:SIZE,... (default: %(default)s)")
    what.add_argument("--duration", type=float, default=d.duration_s, help="seconds of load (default: %(default)g)")
    what.add_argument(
        "--settle", type=float, default=d.settle_s, help="seconds of load after the last change (default: %(default)g)"
    )
    what.add_argument(
        "--window",
        type=float,
        default=d.window_s,
        help="seconds measured before and after a change (default: %(default)g)",
    )
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=float, default=d.rate, help="requests per second (default: %(default)g)")
    if d.rates:
        load.add_argument("--rates", type=_numbers, default=d.rates, help="several rates, instead of --rate")
    load.add_argument("--arrivals", choices=("even", "poisson"), default="even" if d.even else "poisson")
    load.add_argument("--burst-rate", type=float, default=d.burst_rate)
    load.add_argument("--burst-at", type=float, default=d.burst_at)
    load.add_argument("--burst-length", type=float, default=d.burst_s)
    load.add_argument(
        "--prompt-words", default=d.prompt, help="N, LOW-HIGH or lognormal:LOW-HIGH (default: %(default)s)"
    )
    load.add_argument("--output-tokens", default=d.output, help="the same for output tokens (default: %(default)s)")
    load.add_argument(
        "--trace", type=Path, help="file of JSON lines {at, prompt_words, output_tokens}, instead of the options above"
    )
    load.add_argument("--seed", type=int, default=0)
    load.add_argument(
        "--slo-ttft",
        type=float,
        default=d.slo.ttft_s,
        help="limit of the time to first token, seconds (default: %(default)g)",
    )
    load.add_argument(
        "--slo-tpot", type=float, default=d.slo.tpot_s, help="and of the time per token after it (default: %(default)g)"
    )
    if d.ablations:
        load.add_argument(
            "--ablations",
            type=_names,
            default=d.ablations,
            help="mechanisms to disable, one run each; an empty name disables nothing",
        )
    servers = parser.add_argument_group("servers")
    servers.add_argument("--model-path", type=Path, help="model to serve (default: a tiny model, made for the run)")
    servers.add_argument("--device", default="cpu")
    servers.add_argument("--kv-tokens", type=int, default=8192, help="KV tokens per rank (default: %(default)s)")
    servers.add_argument(
        "--boot-limit",
        type=float,
        default=150.0,
        help="seconds for a server that starts during the run (default: %(default)g)",
    )
    servers.add_argument(
        "--server-args",
        type=shlex.split,
        default=[],
        help="further SGLang flags for all servers, quoted as one argument",
    )
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, default=_RESULTS / name, help="output folder (default: %(default)s)")
    if name == "scaling":
        out.add_argument("--page", type=Path, help="write these results into the marked block of this Markdown file")
    source = out.add_mutually_exclusive_group()
    source.add_argument(
        "--again",
        action="store_true",
        help="run nothing: recompute figures, report and picture from the logs in the output folder",
    )
    source.add_argument("--resume", action="store_true", help="run only the cases without a log in the output folder")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything ran (whatever the figures say), 1 when a run was not possible.

    Raises:
        UserInputError: an impossible setting.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return int(args.run(args)) if hasattr(args, "run") else _measure(args, words)
    except (ServerFailed, MethodFailed) as error:
        _say(str(error))
        return 1


def _measure(args: argparse.Namespace, words: Sequence[str]) -> int:
    defaults = _with_flags(COMMANDS[args.command], args)
    unknown = [method for method in defaults.methods if method not in METHODS]
    if unknown:
        raise UserInputError(f"no such method: {', '.join(unknown)}", hint=f"Known: {', '.join(METHODS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    invocation = shlex.join(["elasticmoe", "bench", *words])
    with tempfile.TemporaryDirectory(prefix="elasticmoe-bench-") as folder:
        model, about_model = _model(args, defaults, Path(folder))
        experiment = Experiment(
            defaults=defaults,
            model=model,
            device=args.device,
            kv_tokens=args.kv_tokens,
            seed=args.seed,
            trace=args.trace,
            server_args=tuple(args.server_args),
            log_dir=Path(folder),
            boot_limit_s=args.boot_limit,
        )
        logs = _stored(experiment, args.out) if args.again else _run_all(experiment, args.out, invocation, args.resume)
    results = _results(experiment, logs)
    runs = list(logs.values())
    first, last = runs[0].about, runs[-1].about
    found = Results(
        command=args.command,
        title=defaults.title,
        paper=defaults.paper,
        invocation=last["invocation"],
        machine=first["machine"],
        load_average_after=last["load_average_after"],
        model=about_model,
        workload=describe_workload(defaults),
        slo=defaults.slo,
        results=results,
    )
    (args.out / "figures.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    draw(args.command, results, runs, args.out / "figures.png")
    report = markdown(found)
    (args.out / "report.md").write_text(report)
    if getattr(args, "page", None) is not None:
        page.write(args.page, found, args.out / "figures.png")
    print(report)
    for target in targets(results) if args.command == "scaling" else []:
        if not target.met:
            print(f"elasticmoe bench: {target.name}: wanted {target.wanted}, found {target.found}", file=sys.stderr)
    return 0


def _with_flags(d: Defaults, args: argparse.Namespace) -> Defaults:
    return replace(
        d,
        methods=tuple(args.methods),
        start=args.start,
        changes=args.changes,
        duration_s=args.duration,
        settle_s=args.settle,
        window_s=args.window,
        rate=args.rate,
        rates=tuple(getattr(args, "rates", ())),
        even=args.arrivals == "even",
        burst_rate=args.burst_rate,
        burst_at=args.burst_at,
        burst_s=args.burst_length,
        prompt=args.prompt_words,
        output=args.output_tokens,
        slo=Slo(ttft_s=args.slo_ttft, tpot_s=args.slo_tpot),
        ablations=tuple(getattr(args, "ablations", ())),
    )


def _model(args: argparse.Namespace, d: Defaults, folder: Path) -> tuple[Path, str]:
    if args.model_path is not None:
        return args.model_path, args.model_path.name
    tiny = d.tiny
    about = f"tiny Qwen3-MoE, {tiny.layers} layers, {tiny.experts} experts, hidden {tiny.hidden}, float32"
    if args.again:
        return folder, about
    path = make_tiny_model(folder / "model", layers=tiny.layers, hidden=tiny.hidden, experts=tiny.experts)
    return path, about


def _log_path(out: Path, label: str) -> Path:
    return out / "logs" / f"{label.replace(' ', '_').replace('/', '')}.json"


def _run_all(experiment: Experiment, out: Path, invocation: str, resume: bool) -> dict[str, RunLog]:
    """One case after the other, never two at once."""
    logs = {}
    workload = describe_workload(experiment.defaults)
    for case in experiment.cases():
        path = _log_path(out, case.label)
        if resume and path.exists():
            logs[case.label] = _read(path, workload)
            continue
        method = METHODS[case.method](case.settings, case.plan.schedule.largest)
        about = {
            "label": case.label, "workload": workload, "invocation": invocation, "machine": machine.describe()
        }  # fmt: skip
        try:
            log = asyncio.run(run(method, case.plan, about=about, say=_say))
        finally:
            for server_log in experiment.log_dir.glob("*.log"):
                target = path.with_suffix("") / server_log.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(server_log, target)
        log.about["load_average_after"] = [round(value, 2) for value in os.getloadavg()]
        write_log(path, log)
        logs[case.label] = log
    return logs


def _stored(experiment: Experiment, out: Path) -> dict[str, RunLog]:
    paths = {case.label: _log_path(out, case.label) for case in experiment.cases()}
    missing = [label for label, path in paths.items() if not path.exists()]
    if missing:
        raise UserInputError(f"{out} has no log of {', '.join(missing)}", hint="Run without --again")
    workload = describe_workload(experiment.defaults)
    return {label: _read(path, workload) for label, path in paths.items()}


def _read(path: Path, workload: str) -> RunLog:
    """Raises UserInputError for the log of another workload."""
    log = read_log(path)
    if log.about["workload"] != workload:
        raise UserInputError(
            f"{path} is of another workload: {log.about['workload']}",
            hint=f"Use the settings of that run, or measure again. Asked for: {workload}",
        )
    return log


def _results(experiment: Experiment, logs: dict[str, RunLog]) -> list[Result]:
    d = experiment.defaults
    # Requests are numbered alike in all runs of one rate; with several rates there is nothing common to compare.
    reference = next((log for log in logs.values() if log.method == "static"), next(iter(logs.values())))
    results = []
    for case in experiment.cases():
        log = logs[case.label]
        result = Result(
            label=case.label,
            method=case.method,
            rate=case.plan.workload.rate,
            figures=analyse(log, d.slo, window_s=d.window_s),
        )
        if log is not reference and not d.rates:
            result.different_outputs, result.compared_outputs = compare_outputs(log, reference)
        results.append(result)
    return results


def _say(text: str) -> None:
    print(f"elasticmoe bench: {text}", file=sys.stderr, flush=True)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
