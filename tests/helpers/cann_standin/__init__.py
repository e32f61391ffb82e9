"""A stand-in for CANN's libraries: C, built here with the system compiler against the headers of the torch_npu wheel.

`environment()` is what a process needs to load it in CANN's place. It enforces the documented rules of the virtual
memory calls, and every call that would compute returns an error.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from tests.helpers import torch_npu_wheel

HERE = Path(__file__).parent
# Libraries torch_npu links to. All code is in the first; the others lead there.
CODE = "libascendcl.so"
INACTIVE = ("libacl_op_compiler.so", "libacl_tdt_channel.so", "libge_runner.so", "libgraph.so", "libhccl.so")


class CompilerMissing(Exception):
    """There is no C compiler."""


def build() -> Path:
    """The folder with the libraries; built once per state of the sources. Raises CompilerMissing, WheelMissing."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise CompilerMissing("no gcc, cc or clang on PATH")
    sources = sorted(HERE.glob("*.c"))
    state = hashlib.sha256(b"".join(path.read_bytes() for path in (*sources, HERE / "standin.h"))).hexdigest()[:16]
    target = torch_npu_wheel.ROOT / ".dev" / f"cann-standin-{state}"
    if (target / INACTIVE[-1]).exists():
        return target
    scratch = target.with_name(f"{target.name}.{os.getpid()}")
    scratch.mkdir(parents=True, exist_ok=True)
    include = ["-I", str(torch_npu_wheel.include_dir())]
    warnings = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    shared = [compiler, "-shared", "-fPIC"]
    _run(
        [
            *shared,
            *warnings,
            *include,
            "-Wl,-soname," + CODE,
            *map(str, sources),
            "-o",
            str(scratch / CODE),
            "-lpthread",
        ]
    )
    for name in INACTIVE:
        # A lookup in one of these by dlsym walks on into the library that has the code.
        link = ["-Wl,--no-as-needed", "-L", str(scratch), "-lascendcl", "-Wl,-rpath,$ORIGIN"]
        _run([*shared, "-x", "c", "/dev/null", "-x", "none", f"-Wl,-soname,{name}", *link, "-o", str(scratch / name)])
    try:
        scratch.rename(target)
    except OSError:  # another test process built the same state meanwhile
        shutil.rmtree(scratch)
    return target


def environment(
    *, devices: int = 2, hbm_bytes: int = 4 << 30, soc: str = "Ascend910B3", page: int | None = None
) -> dict[str, str]:
    """os.environ with the stand-in in CANN's place.

    Args:
        page: granularity of device memory; None: CANN's, 2 MiB.
    """
    libraries = os.pathsep.join(filter(None, [str(build()), os.environ.get("LD_LIBRARY_PATH")]))
    return {
        **os.environ,
        "LD_LIBRARY_PATH": libraries,
        "CANN_STANDIN_DEVICES": str(devices),
        "CANN_STANDIN_HBM_BYTES": str(hbm_bytes),
        "CANN_STANDIN_SOC": soc,
        **({} if page is None else {"CANN_STANDIN_PAGE": str(page)}),
        # Without this, `import torch` itself loads torch_npu wherever it is installed.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
    }


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
