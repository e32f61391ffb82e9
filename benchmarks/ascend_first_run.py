"""`python -m benchmarks.ascend_first_run`: the first hour on a machine with Ascend NPUs, as one command and one report.

Runs the steps of docs/ascend-first-run.md one after the other, each in a process of its own with a time limit, goes on
after one that fails, and writes the report anew after each: what ran, how it ended, and the end of what it printed.
Exit status 0 when every step passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from benchmarks.scaling.machine import describe
from elasticmoe_patches.srt.layers.moe.moe_runner.ascend import GEMM_ENV, GEMMS

_TAIL_LINES = 120
_KILLED_AFTER_S = 20
_VERSIONS = """
import importlib.metadata, platform, torch, torch_npu
for name in ("sglang", "torch", "torch_npu", "triton-ascend", "triton", "sgl-kernel-npu"):
    try: print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError: print(name, "not installed")
print("python", platform.python_version(), "machine", platform.machine())
print("NPUs", torch.npu.device_count(), [torch.npu.get_device_name(n) for n in range(torch.npu.device_count())])
"""
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--timeout=300")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One question to the machine. `arguments` are Python's; `variables` are set on top of the environment."""

    name: str
    asks: str
    arguments: Sequence[str] = ()
    program: Sequence[str] = ()
    limit_s: int = 300
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        return list(self.program) or [sys.executable, *self.arguments]


@dataclass(kw_only=True)
class Result:
    name: str
    asks: str
    command: list[str]
    variables: dict[str, str]
    passed: bool
    status: int | None
    seconds: float
    output: str


def steps(out: Path, ranks: int) -> list[Step]:
    """In their order: each needs what the ones before it have shown."""
    suite = "tests/helpers/npu_suite"
    checks = ("-o", "python_files=check_*.py")
    made = [
        Step(name="npu-smi", asks="Does the driver see the NPUs?", program=("npu-smi", "info"), limit_s=60),
        Step(name="versions", asks="Which releases are here?", arguments=("-c", _VERSIONS), limit_s=180),
        Step(
            name="doctor",
            asks="Does the installation fit?",
            arguments=("-m", "elasticmoe_sglang.cli.main", "doctor", "--max-ep-size", str(ranks)),
        ),
        Step(
            name="memory",
            asks="Do CANN's virtual-memory calls keep the rules that this plugin relies on?",
            arguments=(*_PYTEST, "tests/contract/test_vmm.py", "-k", "npu", "-p", "torch_npu"),
            limit_s=600,
        ),
        Step(
            name="tensors",
            asks="Can a slot be remapped under a live tensor, and columns be copied between NPUs?",
            arguments=(*_PYTEST, f"{suite}/check_tensors.py", *checks, "-k", "not compute_fails_loudly"),
        ),
        Step(
            name="hmm",
            asks="Do processes share NPU memory through the HMM?",
            arguments=(*_PYTEST, f"{suite}/check_hmm.py", f"{suite}/check_group.py", *checks),
        ),
    ]
    gemms = sorted(GEMMS)  # torch_npu's first: it needs no compiler
    for gemm in gemms:
        made.append(
            Step(
                name=f"experts-{gemm}",
                asks=f"Does {gemm} compute an expert layer rightly?",
                arguments=("-m", "benchmarks.ascend_experts", gemm),
                limit_s=600,
            )
        )
    for gemm in gemms:
        made.append(
            Step(
                name=f"serve-{gemm}",
                asks=f"Does a served model keep its tokens through 1 -> {ranks} -> 1 ranks, with {gemm}?",
                arguments=(
                    "-m", "benchmarks.demo", "--device", "npu", "--plain", "--sizes", f"1,{ranks},1",
                    "--out", str(out / f"serve-{gemm}"),
                ),
                limit_s=1200,
                variables={GEMM_ENV: gemm},
            )
        )  # fmt: skip
    return made


def run(step: Step) -> Result:
    """Carry out one step; its whole session is killed when its time is over."""
    began = time.monotonic()
    status: int | None = None
    try:
        process = subprocess.Popen(
            step.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **step.variables},
            start_new_session=True,
        )
    except OSError as error:
        text = f"cannot be started: {error}"
    else:
        text, status = _wait(process, step.limit_s)
    return Result(
        name=step.name,
        asks=step.asks,
        command=step.command,
        variables=dict(step.variables),
        passed=status == 0,
        status=status,
        seconds=round(time.monotonic() - began, 1),
        output="\n".join(text.splitlines()[-_TAIL_LINES:]),
    )


def _wait(process: subprocess.Popen[str], limit_s: int) -> tuple[str, int | None]:
    """What it printed, and its status: None when its time was over."""
    try:
        return process.communicate(timeout=limit_s)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        try:
            text = process.communicate(timeout=_KILLED_AFTER_S)[0]
        except subprocess.TimeoutExpired:
            text = ""
        return f"{text}\nkilled after {limit_s} s", None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ascend_first_run", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("ascend-first-run"), help="folder (default: %(default)s)")
    parser.add_argument("--ranks", type=int, choices=range(2, 5), default=2, help="NPUs to use (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps only")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = steps(args.out, args.ranks)
    if unknown := sorted(set(args.only or ()) - {step.name for step in chosen}):
        parser.error(f"no such step: {', '.join(unknown)}; there are {', '.join(step.name for step in chosen)}")
    results: list[Result] = []
    for step in chosen:
        if args.only and step.name not in args.only:
            continue
        print(f"{step.name:24} {step.asks}", flush=True)
        results.append(run(step))
        _write(args.out / "report.json", results)
        said = "ok" if results[-1].passed else "FAILED"
        print(f"{said:>24} after {results[-1].seconds:.0f} s", flush=True)
    failed = [result.name for result in results if not result.passed]
    print(f"{len(results) - len(failed)} of {len(results)} steps passed; {args.out / 'report.json'} has everything")
    return 1 if failed else 0


def _write(path: Path, results: Sequence[Result]) -> None:
    report = {"machine": describe(), "environment": _environment(), "steps": results}
    scratch = path.with_suffix(".new")
    scratch.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    scratch.rename(path)


def _environment() -> dict[str, str]:
    """Variables that decide how CANN, torch_npu, SGLang and this plugin behave."""
    words = ("ASCEND", "NPU", "HCCL", "TASK_QUEUE", "SGLANG", "ELASTICMOE", "CANN")
    return {name: value for name, value in sorted(os.environ.items()) if any(word in name for word in words)}


if __name__ == "__main__":
    sys.exit(main())
