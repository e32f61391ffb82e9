"""CANN's headers, as the torch_npu wheel ships them. The wheel is fetched once into .dev/, which git ignores."""

from __future__ import annotations

import functools
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSION = "2.13.0"
_INCLUDE = "torch_npu/include/third_party/"


class WheelMissing(Exception):
    """The wheel cannot be had; the text says why."""


@functools.cache
def include_dir() -> Path:
    """The folder that holds `acl/acl_rt.h`. Raises WheelMissing."""
    return _unpacked() / _INCLUDE / "acl/inc"


def _unpacked() -> Path:
    target = ROOT / ".dev" / f"torch_npu-{VERSION}-headers"
    if not (target / ".complete").exists():
        wheel = _wheel()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [name for name in archive.namelist() if name.startswith(_INCLUDE)])
        (target / ".complete").touch()
    return target


def _wheel() -> Path:
    folder = ROOT / ".dev" / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"torch_npu-{VERSION}-*.whl"))
    if not found:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run(
            [*command, "--dest", str(folder), f"torch_npu=={VERSION}"], capture_output=True, text=True, timeout=600
        )
        found = sorted(folder.glob(f"torch_npu-{VERSION}-*.whl"))
        if done.returncode or not found:
            raise WheelMissing(f"torch_npu {VERSION} cannot be downloaded: {done.stderr.strip()[-300:]}")
    return found[0]
