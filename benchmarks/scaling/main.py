"""`elasticmoe bench`: one command per experiment, and `report`; also `python -m benchmarks.scaling.main`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from benchmarks.scaling import machine
from benchmarks.scaling.experiments import EXPERIMENTS, Arm, Experiment
from benchmarks.scaling.groups import Group
from benchmarks.scaling.methods import METHODS, MethodFailed
from benchmarks.scaling.plots import draw
from benchmarks.scaling.records import RunLog, read_log, write_log
from benchmarks.scaling.report import markdown, targets_table, write_block
from benchmarks.scaling.runner import carry_out
from benchmarks.scaling.servers import ServerSettings
from benchmarks.scaling.summary import Results, summarise
from benchmarks.scaling.targets import judge
from benchmarks.server import ServerFailed
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.tiny_model import make_tiny_model

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elasticmoe bench",
        description="Measure what a change of size costs, compared with what users do today. Runs real servers.",
    )
    commands = parser.add_subparsers(dest="command", metavar="EXPERIMENT", required=True)
    for name, experiment in EXPERIMENTS.items():
        text = f"{experiment.title}."
        sub = commands.add_parser(name, help=experiment.title, description=f"{text} {experiment.paper}")
        sub.set_defaults(run=_measure)
        _add_arguments(sub, name, experiment)
    every = commands.add_parser("all", help="all of these, one after the other")
    every.add_argument("--repetitions", type=int, help="instead of each experiment's own")
    every.set_defaults(run=_all)
    report = commands.add_parser("report", help="write README.md and docs/benchmarks.md from the committed figures")
    report.add_argument("--again", action="store_true", help="recompute every committed figure from its log first")
    report.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    report.set_defaults(run=_report)
    from benchmarks.policy import autoscale, cost
    from benchmarks.scaling import simulation_command

    for command in (simulation_command, autoscale, cost):
        command.add_parser(commands)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, name: str, experiment: Experiment) -> None:
    known = [arm.name for arm in experiment.arms]
    parser.add_argument("--arms", nargs="+", choices=known, default=known, metavar="ARM", help=f"out of: {known}")
    parser.add_argument(
        "--repetitions", type=int, default=experiment.repetitions, help="of each arm (default: %(default)s)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go through those arms and repetitions of which a log is missing"
    )
    parser.add_argument("--within", type=float, metavar="SECONDS", help="begin no other repetition after this long")
    parser.add_argument("--again", action="store_true", help="run nothing: recompute everything from the logs")
    servers = parser.add_argument_group("servers")
    servers.add_argument("--model-path", type=Path, help="model to serve (default: a tiny model, made for the run)")
    servers.add_argument("--device", default="cpu")
    servers.add_argument("--kv-tokens", type=int, default=32768, help="KV tokens per rank (default: %(default)s)")
    servers.add_argument(
        "--boot-limit",
        type=float,
        default=400.0,
        help="seconds for a server that starts during a run (default: %(default)g)",
    )
    servers.add_argument(
        "--server-args", type=shlex.split, default=[], help="further SGLang flags for all servers, in one argument"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / name, help="output folder (default: %(default)s)")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything ran and every target was met; 1 when a target was missed or a run was not possible.

    Raises:
        UserInputError: an impossible setting.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    args.invocation = shlex.join(["elasticmoe", "bench", *words])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return int(args.run(args))
    except (ServerFailed, MethodFailed) as error:
        _say(str(error))
        return 1


def _all(args: argparse.Namespace) -> int:
    more = ["--repetitions", str(args.repetitions)] if args.repetitions else []
    statuses = [main([name, *more]) for name in EXPERIMENTS]
    return max(*statuses, main(["report"]))


# -- measuring --------------------------------------------------------------------------------------------------------


def _measure(args: argparse.Namespace) -> int:
    experiment = EXPERIMENTS[args.command]
    logs = args.out / "logs"
    if not args.again:
        if not args.resume:
            shutil.rmtree(logs, ignore_errors=True)
        _run_sessions(args, experiment, logs)
    results = _write(args.command, args.out)
    print(markdown(results, experiment))
    missed = [verdict for verdict in judge(results) if not verdict.met]
    for verdict in missed:
        _say(f"missed: {verdict.target.text}: {verdict.found}, wanted {verdict.wanted}")
    return 1 if missed else 0


def _run_sessions(args: argparse.Namespace, experiment: Experiment, logs: Path) -> None:
    """Each arm once in a repetition, in a shuffled order: what drifts on the machine meets all of them."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="elasticmoe-bench-") as scratch:
        folder = Path(scratch)
        model, about_model = _model(args, experiment, folder)
        for repetition in range(args.repetitions):
            arms = [arm for arm in experiment.arms if arm.name in args.arms]
            random.Random(repetition).shuffle(arms)
            for arm in arms:
                if args.within is not None and time.monotonic() - began > args.within:
                    return
                if all(_log_path(logs, arm.name, run.name, repetition).exists() for run in arm.runs):
                    continue
                about = {"machine": machine.describe(), "model": about_model, "invocation": args.invocation}
                settings = ServerSettings(
                    model=str(model), device=args.device, kv_tokens=args.kv_tokens, log_dir=folder,
                    boot_limit_s=args.boot_limit, args=(*experiment.flags, *args.server_args), without=arm.without,
                )  # fmt: skip
                try:
                    _session(experiment, arm, repetition, settings, about, logs)
                finally:
                    _keep_server_logs(folder, logs / slug(arm.name) / f"servers-{repetition}")


def _session(
    experiment: Experiment, arm: Arm, repetition: int, settings: ServerSettings, about: dict[str, object], logs: Path
) -> None:
    def keep(log: RunLog) -> None:
        write_log(_log_path(logs, arm.name, log.run, repetition), log)

    with _group() as group:
        if group is not None:
            settings = replace(settings, enter=group.enter)
        method = METHODS[arm.method](settings, arm.largest)
        asyncio.run(carry_out(experiment, arm, repetition, method, group=group, about=about, say=_say, keep=keep))


@contextlib.contextmanager
def _group() -> Iterator[Group | None]:
    """None where this user may make no control group: memory and CPU time are then not measured, and it is said."""
    group = Group()
    try:
        group.__enter__()
    except OSError as error:
        _say(f"memory and CPU time are not measured: {error}")
        yield None
        return
    try:
        yield group
    finally:
        group.__exit__()


def _model(args: argparse.Namespace, experiment: Experiment, folder: Path) -> tuple[Path, str]:
    if args.model_path is not None:
        return args.model_path, args.model_path.name
    tiny = experiment.tiny
    sizes = {"layers": tiny.layers, "hidden": tiny.hidden, "experts": tiny.experts}
    return make_tiny_model(folder / "model", arch=tiny.arch, skew=tiny.skew, **sizes), tiny.about


def _keep_server_logs(folder: Path, target: Path) -> None:
    """For whoever looks for the cause of something; git ignores them."""
    for log in folder.glob("*.log"):
        target.mkdir(parents=True, exist_ok=True)
        shutil.move(log, target / log.name)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _log_path(logs: Path, arm: str, run: str, repetition: int) -> Path:
    return logs / slug(arm) / f"{slug(run)}-{repetition}.json.xz"


# -- reporting --------------------------------------------------------------------------------------------------------


def recompute(name: str, out: Path) -> tuple[Results, list[RunLog]]:
    """From all logs in the folder. Raises UserInputError where there is none."""
    logs = [read_log(path) for path in sorted((out / "logs").glob("*/*.json.xz"))]
    if not logs:
        raise UserInputError(f"{out} has no logs", hint="Run without --again")
    return summarise(name, EXPERIMENTS[name], logs), logs


def as_json(results: Results) -> bytes:
    return msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"


def _write(name: str, out: Path) -> Results:
    results, logs = recompute(name, out)
    (out / "figures.json").write_bytes(as_json(results))
    (out / "report.md").write_text(markdown(results, EXPERIMENTS[name]))
    draw(logs, out / "figures.png")
    return results


def committed(folder: Path) -> list[Results]:
    """The figures of every experiment of which there are some, in the experiments' order."""
    paths = [folder / name / "figures.json" for name in EXPERIMENTS]
    return [msgspec.json.decode(path.read_bytes(), type=Results) for path in paths if path.exists()]


def differences(folder: Path) -> list[str]:
    """Experiments whose committed figures or report are not what their logs give."""
    found = []
    for results in committed(folder):
        out = folder / results.experiment
        again, _ = recompute(results.experiment, out)
        report = markdown(again, EXPERIMENTS[results.experiment])
        if (out / "figures.json").read_bytes() != as_json(again) or (out / "report.md").read_text() != report:
            found.append(results.experiment)
    return found


def pages(found: Sequence[Results]) -> dict[Path, str]:
    """The blocks of the pages that show results."""
    if not found:
        return dict.fromkeys((ROOT / "README.md", ROOT / "docs" / "benchmarks.md"), "No results are committed.")
    return {
        ROOT / "README.md": targets_table(found),
        ROOT / "docs" / "benchmarks.md": "\n".join(
            markdown(results, EXPERIMENTS[results.experiment], "##") for results in found
        ),
    }


def _report(args: argparse.Namespace) -> int:
    wrong = differences(args.results) if args.again else []
    for name in wrong:
        _say(f"{name}: the logs give other figures than those in {args.results / name}")
    found = committed(args.results)
    for page, text in pages(found).items():
        write_block(page, text)
    print(targets_table(found))
    return 1 if wrong or not all(verdict.met for results in found for verdict in judge(results)) else 0


def _say(text: str) -> None:
    print(f"elasticmoe bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
