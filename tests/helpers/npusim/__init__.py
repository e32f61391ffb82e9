"""The simulated NPU: what a test needs to start a process on it, or a skip that says why not. See README.md."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import cann_standin, torch_npu_wheel
from tests.helpers.triton_ascend import execute

HERE = Path(__file__).parent
ROOT = torch_npu_wheel.ROOT
_BUILD_S = 900


TRITON_ASCEND = {"ELASTICMOE_NPU_GEMM": "triton", "NPUSIM_TRITON_ASCEND": "1"}
"""Variables with which the experts are this project's Triton-Ascend kernels."""


def python_or_skip(*, triton_ascend: bool = False) -> str:
    """The interpreter of the simulated NPU's venv, which is built where it is not there.

    Args:
        triton_ascend: what lowers and compiles this project's kernels is needed too.
    """
    environment = {**os.environ, "PYTHON": sys.executable}
    script = ROOT / "tests/helpers/make_npusim_venv.sh"
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True, timeout=_BUILD_S)
    if done.returncode:
        pytest.skip(f"torch_npu 2.13.0 cannot be installed: {done.stderr.strip()[-300:]}")
    try:
        cann_standin.build()
        library()
        if triton_ascend:
            execute.triton_ascend_python()
            execute.install_llvm()
    except (cann_standin.CompilerMissing, torch_npu_wheel.WheelMissing, execute.ToolMissing) as error:
        pytest.skip(f"the simulated NPU cannot be built: {error}")
    return done.stdout.strip().splitlines()[-1]


def library() -> Path:
    """device.cpp as a library, built once per state of the source and of torch. Raises CompilerMissing."""
    import torch

    compiler = shutil.which("g++")
    if compiler is None:
        raise cann_standin.CompilerMissing("no g++ on PATH")
    source = HERE / "device.cpp"
    state = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    target = ROOT / ".dev" / f"npusim-{state}.so"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    installed = Path(torch.__file__).parent
    include = ["-I", str(installed / "include"), "-I", str(installed / "include/torch/csrc/api/include")]
    link = ["-L", str(installed / "lib"), "-ltorch_cpu", "-ltorch", "-lc10", f"-Wl,-rpath,{installed / 'lib'}"]
    command = [compiler, "-shared", "-fPIC", "-O1", "-std=c++20", *include, str(source), *link, "-o", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    scratch.rename(target)
    return target


def environment(
    *, devices: int = 2, hbm_bytes: int = 2 << 30, late: int = 0, record: Path | None = None, page: int | None = None
) -> dict[str, str]:
    """os.environ for a process on the simulated NPU.

    Args:
        late: a seed; which copies are carried out only when somebody waits for them. 0: all of them.
        record: an empty folder, in which each process leaves the operators that it ran (`recorded`).
        page: granularity of device memory; None: CANN's, 2 MiB.
    """
    path = [HERE / "site", ROOT, ROOT / "kernels", ROOT / "patches"]
    return {
        **cann_standin.environment(devices=devices, hbm_bytes=hbm_bytes, page=page),
        # torch loads torch_npu, and then what replaces its kernels, wherever it is imported.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "NPUSIM_LIBRARY": str(library()),
        "CANN_STANDIN_LATE": str(late),
        **({} if record is None else {"NPUSIM_RECORD": str(record)}),
        # torch_npu's queue of launches would run operators in a thread of its own.
        "TASK_QUEUE_ENABLE": "0",
        "ASCEND_LAUNCH_BLOCKING": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "TRITON_INTERPRET": "1",
        # Without what lowers our own kernels (TRITON_ASCEND).
        "ELASTICMOE_NPU_GEMM": "grouped_matmul",
    }


def recorded(folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Operator -> calls in all processes, and operator -> how its outputs were checked."""
    calls: dict[str, int] = {}
    checked: dict[str, str] = {}
    for path in folder.glob("*.json"):
        found = json.loads(path.read_text())
        checked.update(found["checked"])
        for name, count in found["calls"].items():
            calls[name] = calls.get(name, 0) + count
    return calls, checked


def addresses(folder: Path, pid: int) -> dict[str, list[int]]:
    """Kernel and argument -> where that process's kernels were told to find it."""
    found: dict[str, list[int]] = json.loads((folder / f"{pid}.json").read_text())["addresses"]
    return found
