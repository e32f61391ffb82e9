"""What a result was found on: the one place from which every benchmark and every recorded test takes it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_AT_START = tuple(round(value, 2) for value in os.getloadavg())


def describe() -> dict[str, Any]:
    """Commit, cores, memory, versions, and how busy the machine is.

    Returns:
        commit: of this checkout, empty outside of one; tree_clean: whether no tracked file has an uncommitted change,
            None where that cannot be told.
        load_average: now, over 1, 5 and 15 minutes; load_before: when this process began.
    """
    commit, clean = checkout()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit,
        "tree_clean": clean,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "governor": _GOVERNOR.read_text().strip() if _GOVERNOR.exists() else "not visible",
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "sglang", "elasticmoe-sglang")},
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "load_before": list(_AT_START),
    }


def checkout() -> tuple[str, bool | None]:
    """The commit, and whether no tracked file has an uncommitted change (None where that cannot be told).

    Without git, or outside of a checkout: nothing. A copy of a checkout is told by COMMIT what it is a copy of.
    """
    if told := os.environ.get("COMMIT"):
        return told, None
    try:
        commit, changes = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "-uno")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "", None
    return commit, not changes


def _git(*words: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
