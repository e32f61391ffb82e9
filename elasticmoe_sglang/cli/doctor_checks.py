"""The checks of `elasticmoe doctor`.

Facts about SGLang come from `python -m elasticmoe_patches.preflight --json`, run as a program: this package never
imports SGLang, and a broken installation of it must not break this command.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil

from elasticmoe_sglang import SUPPORTED_SGLANG, SUPPORTED_SGLANGS
from elasticmoe_sglang.answers import ask_program
from elasticmoe_sglang.errors import ElasticMoEError, UserInputError, VmmError
from elasticmoe_sglang.units import format_bytes

HOOKS_TIMEOUT_S = 180.0
"""SGLang's modules take some ten seconds to import on two cores; a cold disk cache takes several times that."""
MIN_DESCRIPTORS = 4096
"""Each mapped expert column is one descriptor in the HMM, and each connection a few."""
MIN_FREE_MEMORY = 2 << 30
"""Bytes below which not even a small model's server starts: each rank's SGLang takes some 600 MiB."""

_PACKAGES = ("torchvision", "pyzmq", "msgspec", "numpy", "psutil", "safetensors", "uvloop", "fastapi", "triton")
"""Distributions that serving needs, in any version."""
_TRANSFORMERS = {"0.5.21": "5.12.1", "0.5.23": "5.19.0"}
"""SGLang's version -> the transformers it pins."""
# By kind of device. SGLang asks for 2.13.0; on an H100 and an H200 2.11.0 served, with the sglang-kernel built for it.
_TORCH = {"cuda": ("2.11.0", "2.13.0")}
# By kind of device: what that kind's own checks judge. On NPUs triton-ascend takes triton's place.
_ELSEWHERE = {"npu": ("triton",)}
_ENTRY_POINTS = (("sglang.srt.plugins", "elasticmoe"), ("sglang.srt.platforms", "elasticmoe_cpu"))
_REINSTALL = "pip install --no-deps elasticmoe-sglang (in a checkout: make venv)"


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    """The command that fixes it; empty if `ok`."""
    required: bool = True
    """Whether serving needs it; a failed check that is not required is a warning."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device for ranks; a machine without accelerator has one entry for the host."""

    kind: str
    number: int
    name: str
    memory: str


@dataclass(frozen=True, kw_only=True)
class HookReport:
    """The report of preflight: one row per hook, or why there is none.

    Attributes:
        uses: how many of SGLang's attributes the plugin uses. missing: those that the installed SGLang has not.
        changed: hooked functions whose body is not the one that the hook was written for.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""
    uses: int = 0
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)


def versions(kind: str) -> list[Check]:
    """Python and the packages that serving imports on this kind of device."""
    python = sys.version_info[:2]
    supported = (3, 10) <= python < (3, 14)
    checks = [
        Check(
            name="python",
            ok=supported,
            found=platform.python_version(),
            fix="" if supported else "make distclean && make PYTHON=python3.12 venv",
        )
    ]
    torch = _package("torch", *_TORCH.get(kind, ("2.13.0",)))
    sglang = _package("sglang", *SUPPORTED_SGLANGS)
    transformers = _package("transformers", _TRANSFORMERS.get(sglang.found, _TRANSFORMERS[SUPPORTED_SGLANG]))
    others = (name for name in _PACKAGES if name not in _ELSEWHERE.get(kind, ()))
    return [*checks, torch, sglang, transformers, *map(_package, others)]


def installed_version(name: str) -> str:
    """Version of an installed distribution; empty where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _package(name: str, *wanted: str) -> Check:
    """`wanted`: the versions that serve, the best last; any where none is named."""
    found = installed_version(name)
    # A build tag such as 2.13.0+cpu is the same version.
    ok = bool(found) and (not wanted or found.split("+")[0] in wanted)
    text = found or "not installed"
    no_deps = "--no-deps " if name in ("sglang", "torchvision") else ""
    fix = f"{sys.executable} -m pip install {no_deps}{name}" + (f"=={wanted[-1]}" if wanted else "")
    return Check(
        name=name,
        ok=ok,
        found=text if ok or not wanted else f"{text}, needs {' or '.join(wanted)}",
        fix="" if ok else fix,
    )


def installation() -> list[Check]:
    """Whether SGLang finds the plugin and the CPU platform."""
    missing = [
        name
        for group, name in _ENTRY_POINTS
        if not any(entry.name == name for entry in importlib.metadata.entry_points(group=group))
    ]
    plugins = os.environ.get("SGLANG_PLUGINS", "")
    allowed = not plugins or "elasticmoe" in [name.strip() for name in plugins.split(",")]
    return [
        Check(
            name="entry points",
            ok=not missing,
            found="registered with SGLang" if not missing else f"not registered: {', '.join(missing)}",
            fix="" if not missing else _REINSTALL,
        ),
        Check(
            name="SGLANG_PLUGINS",
            ok=allowed,
            found=plugins or "not set: all plugins are loaded",
            fix="" if allowed else f"export SGLANG_PLUGINS={plugins},elasticmoe",
        ),
    ]


class _Preflight(msgspec.Struct):
    """What `python -m elasticmoe_patches.preflight --json` prints, as far as it is shown."""

    hooks: list[dict[str, Any]]
    uses: int
    missing: list[str]
    changed: list[str]


def hooks() -> HookReport:
    """Run preflight in a separate process."""
    found = ask_program("elasticmoe_patches.preflight", "--json", answer=_Preflight, timeout_s=HOOKS_TIMEOUT_S)
    if isinstance(found, str):
        return HookReport(error=found)
    return HookReport(rows=found.hooks, uses=found.uses, missing=found.missing, changed=found.changed)


def hooks_check(report: HookReport) -> Check:
    """All hooks together as one check."""
    bad = [row["target"] for row in report.rows if not row["ok"]]
    ok = bool(report.rows) and not bad
    if report.error:
        found = f"not known: {report.error}"
    else:
        found = f"{len(report.rows)} fit" if ok else f"{len(bad)} of {len(report.rows)} do not fit SGLang"
    fix = f"{sys.executable} -m pip install --force-reinstall --no-deps sglang=={SUPPORTED_SGLANG}"
    return Check(name="hooks", ok=ok, found=found, fix="" if ok else fix)


def uses_checks(report: HookReport) -> list[Check]:
    """What the plugin uses of SGLang besides its hooks, and bodies of hooked functions; nothing without a report."""
    if report.error:
        return []
    fix = f"{sys.executable} -m pip install --force-reinstall --no-deps sglang=={SUPPORTED_SGLANG}"
    missing, changed = report.missing, report.changed
    return [
        Check(
            name="used attributes",
            ok=not missing,
            found=f"{report.uses} there" if not missing else f"not in this SGLang: {'; '.join(missing)}",
            fix=fix if missing else "",
        ),
        Check(
            name="hooked bodies",
            ok=not changed,
            found="as read" if not changed else f"not the source that was read: {', '.join(changed)}",
            fix=fix if changed else "",
            required=False,
        ),
    ]


class DeviceRoom(Protocol):
    """Bytes of one device's memory."""

    @property
    def free(self) -> int: ...

    @property
    def total(self) -> int: ...


def device_memory(kind: str, devices: Sequence[DeviceRoom], needed: int, *, tool: str) -> Check:
    """Whether each of these devices has `needed` bytes free. tool: the driver's, which lists what uses a device."""
    least = min(device.free for device in devices)
    ok = least >= needed
    each = f"{format_bytes(least)} of {format_bytes(devices[0].total)} free"
    return Check(
        name=f"{kind} memory",
        ok=ok,
        found=each if ok else f"{each}, {format_bytes(needed)} needed beside weights and KV",
        fix="" if ok else f"{tool}   # then stop what is not needed",
    )


def devices() -> list[Device]:
    """NVIDIA GPUs and Ascend NPUs as their drivers' tools list them; without any, the host's cores."""
    found = _nvidia_devices() or _ascend_devices()
    if found:
        return found
    memory = f"{format_bytes(psutil.virtual_memory().total)} shared by the HMM's arenas"
    return [Device(kind="cpu", number=0, name=f"{len(os.sched_getaffinity(0))} cores", memory=memory)]


def _nvidia_devices() -> list[Device]:
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES", "0") == "":
        return []
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    rows = [line.split(", ") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [Device(kind="cuda", number=int(row[0]), name=row[1], memory=row[2]) for row in rows if len(row) == 3]


def _ascend_devices() -> list[Device]:
    numbers = sorted(int(path.name.removeprefix("davinci")) for path in Path("/dev").glob("davinci[0-9]*"))
    return [Device(kind="npu", number=number, name="Ascend NPU", memory="see npu-smi info") for number in numbers]


def memory(kind: str) -> list[Check]:
    """Free host memory, and a round trip through the memory backend of this kind of device."""
    free = psutil.virtual_memory().available
    return [
        Check(
            name="free memory",
            ok=free >= MIN_FREE_MEMORY,
            found=format_bytes(free),
            fix="" if free >= MIN_FREE_MEMORY else "ps aux --sort=-rss | head   # then stop what is not needed",
        ),
        _backend_check(kind),
    ]


def _backend_check(kind: str) -> Check:
    name = f"memory backend {kind}"
    try:
        nbytes = _round_trip(kind)
    except (ElasticMoEError, ImportError) as error:
        serve_on_cpu = "CUDA_VISIBLE_DEVICES= elasticmoe serve ...   # serves on the host's cores"
        return Check(name=name, ok=False, found=str(error), fix=_BACKEND_FIXES.get(kind, serve_on_cpu))
    return Check(name=name, ok=True, found=f"reserved, mapped and shared {format_bytes(nbytes)}")


_BACKEND_FIXES = {
    "cpu": "ulimit -v unlimited; ulimit -n 65536",
    "npu": "source /usr/local/Ascend/ascend-toolkit/set_env.sh",
}


def _round_trip(kind: str) -> int:
    """Reserve addresses, create memory, export and import it by descriptor, map it, and release everything.

    Raises:
        VmmError: there is no such backend, or a driver call failed.
    """
    from elasticmoe_sglang.hmm.vmm import backend_names, get_backend

    if kind not in backend_names():
        raise VmmError(f"there is no memory backend for {kind}; known: {', '.join(backend_names())}")
    backend = get_backend(kind)
    nbytes = backend.granularity
    space = backend.reserve(nbytes)
    try:
        made = backend.create(nbytes, 0)
        descriptor = backend.export(made)
        taken = backend.import_(descriptor, nbytes, 0)
        backend.map(space.base, taken)
        backend.unmap(space.base, nbytes)
        backend.close(taken)
        backend.close(made)
    finally:
        backend.release_va(space)
    return nbytes


def system() -> list[Check]:
    """Limits and tools of the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    compilers = [name for name in ("gcc", "g++") if shutil.which(name) is None]
    enough = soft == resource.RLIM_INFINITY or soft >= MIN_DESCRIPTORS
    wanted = MIN_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MIN_DESCRIPTORS)
    return [
        Check(name="open files", ok=enough, found=f"limit {soft}", fix="" if enough else f"ulimit -n {wanted}"),
        Check(
            name="compilers",
            ok=not compilers,
            found="gcc, g++" if not compilers else f"missing: {', '.join(compilers)}",
            fix="" if not compilers else f"apt-get install -y {' '.join(compilers)}",
            required=False,
        ),
        _run_folder(),
    ]


def _run_folder() -> Check:
    from elasticmoe_sglang.config import ElasticConfig
    from elasticmoe_sglang.runtime import new_runtime

    try:
        runtime = new_runtime(ElasticConfig(ep_size=1, max_ep_size=1))
        runtime.paths.run_dir.rmdir()
    except (UserInputError, OSError) as error:
        return Check(name="run folder", ok=False, found=str(error), fix="export TMPDIR=/tmp")
    return Check(name="run folder", ok=True, found=tempfile.gettempdir())
