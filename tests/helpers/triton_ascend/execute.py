"""From a kernel file to numbers: lower in .venv-ascend, compile the Linalg with LLVM 19, call it once for each core."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CACHE = ROOT / ".dev" / "triton-ascend"
KERNELS = ROOT / "kernels" / "elasticmoe_kernels" / "ascend"
LLVM = "19"

# Bufferisation, then loops, then LLVM's dialect. The same order that mlir-opt's own integration tests use.
PASSES = (
    "--convert-elementwise-to-linalg",
    "--eliminate-empty-tensors",
    "--empty-tensor-to-alloc-tensor",
    "--one-shot-bufferize=allow-return-allocs-from-loops=true bufferize-function-boundaries=false",
    "--buffer-deallocation-pipeline",
    "--canonicalize",
    "--convert-linalg-to-loops",
    "--expand-strided-metadata",
    "--lower-affine",
    "--convert-scf-to-cf",
    "--memref-expand",
    "--expand-strided-metadata",
    "--lower-affine",
    "--arith-expand",
    "--convert-math-to-llvm",
    "--convert-math-to-libm",
    "--convert-arith-to-llvm",
    "--finalize-memref-to-llvm",
    "--convert-func-to-llvm",
    "--convert-cf-to-llvm",
    "--convert-index-to-llvm",
    "--canonicalize",
    "--reconcile-unrealized-casts",
)

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}


class ToolMissing(Exception):
    """triton-ascend or LLVM cannot be had; the text says which."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One kernel with its argument types ("*bf16", "i32") and compile-time constants."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    file: Path | None = None  # default: KERNELS/<kernel>.py

    @property
    def source(self) -> Path:
        return self.file or KERNELS / f"{self.kernel}.py"

    @property
    def name(self) -> str:
        text = repr(
            (
                self.source.read_text(),
                self.kernel,
                self.signature,
                self.constants,
                PASSES,
                (HERE / "lower.py").read_text(),
            )
        )
        return f"{self.kernel}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@functools.cache
def install_llvm() -> None:
    """LLVM 19 from Debian's packages, unless it is there."""
    done = subprocess.run([str(ROOT / "tests/helpers/install_llvm.sh")], capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise ToolMissing(f"LLVM {LLVM} cannot be installed: {done.stderr.strip()[-300:]}")


def tool(name: str) -> str:
    """An LLVM 19 program."""
    install_llvm()
    found = shutil.which(f"{name}-{LLVM}") or shutil.which(name, path=f"/usr/lib/llvm-{LLVM}/bin")
    assert found is not None, name
    return found


def triton_ascend_python() -> str:
    """The interpreter of .venv-ascend, which is built when missing."""
    script, environment = (
        str(ROOT / "tests/helpers/make_triton_ascend_venv.sh"),
        {**os.environ, "PYTHON": sys.executable},
    )
    done = subprocess.run([script], env=environment, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        raise ToolMissing(f"triton-ascend 3.2.0 cannot be installed: {done.stderr.strip()[-300:]}")
    return done.stdout.strip().splitlines()[-1]


def lower(jobs: list[Job]) -> dict[Job, Path]:
    """The Linalg file of each job; all that are missing are lowered in one run of triton-ascend's Python."""
    CACHE.mkdir(parents=True, exist_ok=True)
    files = {job: CACHE / f"{job.name}.mlir" for job in jobs}
    missing = [job for job, path in files.items() if not path.exists()]
    if missing:
        orders = [
            {
                "file": str(job.source),
                "kernel": job.kernel,
                "signature": dict(job.signature),
                "constants": dict(job.constants),
                "output": str(files[job]),
            }
            for job in missing
        ]
        listing = CACHE / f"jobs-{hashlib.sha256(repr(orders).encode()).hexdigest()[:16]}.json"
        listing.write_text(json.dumps(orders))
        command = [triton_ascend_python(), str(HERE / "lower.py"), str(listing)]
        environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
    return files


class Compiled:
    """A lowered kernel as native code. Called like the kernel, with the grid first."""

    def __init__(self, linalg: Path) -> None:
        self.linalg = linalg.read_text()
        library = linalg.with_suffix(".so")
        if not library.exists():
            _compile(linalg, library)
        header = re.search(r"func\.func @(\w+)\((.*?)\) attributes", self.linalg, re.S)
        assert header, f"no kernel in {linalg}"
        self._function = getattr(ctypes.CDLL(str(library)), header[1])
        self._function.restype = None
        self._types = [re.match(r"%arg\d+: (\S+?)(?:,|$| \{)", text)[1] for text in re.split(r", (?=%arg)", header[2])]

    def __call__(self, cores: int, *arguments: torch.Tensor | int) -> None:
        # Two hidden arguments come first (a lock and a workspace), the grid and the program's place in it last.
        for core in range(cores):
            values = [None, None, *arguments, cores, 1, 1, core, 0, 0]
            assert len(values) == len(self._types), (len(values), self._types)
            words = [word for value, kind in zip(values, self._types, strict=True) for word in _words(value, kind)]
            self._function(*words)


def _words(value: torch.Tensor | int | None, kind: str) -> list[ctypes._SimpleCData]:
    if kind.startswith("memref"):
        pointer = ctypes.c_void_p(value.data_ptr() if isinstance(value, torch.Tensor) else None)
        length = value.numel() if isinstance(value, torch.Tensor) else 0
        return [pointer, pointer, ctypes.c_int64(0), ctypes.c_int64(length), ctypes.c_int64(1)]
    assert isinstance(value, int), (value, kind)
    return [{"i32": ctypes.c_int32, "i64": ctypes.c_int64}[kind](value)]


def _compile(linalg: Path, library: Path) -> None:
    # Hints for Ascend's own compiler; stock MLIR does not know them and they change no result.
    text = re.sub(r"^ *annotation\.mark .*\n", "", linalg.read_text(), flags=re.M)
    prepared, dialect, ir = (linalg.with_suffix(f".{os.getpid()}.{step}") for step in ("stock.mlir", "llvm.mlir", "ll"))
    prepared.write_text(text)
    _run([tool("mlir-opt"), str(prepared), "--allow-unregistered-dialect", *PASSES, "-o", str(dialect)])
    _run([tool("mlir-translate"), "--mlir-to-llvmir", str(dialect), "-o", str(ir)])
    partial = library.with_suffix(f".{os.getpid()}.so")
    common = ["-O2", "-march=native", "-shared", "-fPIC", "-Wno-override-module"]
    _run(
        [tool("clang"), *common, "-x", "ir", str(ir), "-x", "c", str(HERE / "memref_copy.c"), "-lm", "-o", str(partial)]
    )
    partial.rename(library)
    for left in (prepared, dialect, ir):
        left.unlink()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr[-3000:]}")
