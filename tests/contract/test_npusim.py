"""The simulated NPU finds the mistakes that it is for (tests/helpers/npusim/README.md)."""

from __future__ import annotations

import subprocess

import pytest

from tests.helpers import npusim

# Building its venv and library takes a minute or more, so it is not in `make test`; npu_suite runs there without it.
pytestmark = [pytest.mark.toolchain, pytest.mark.soak, pytest.mark.timeout(1500)]


def test_mistakes_are_found() -> None:
    python = npusim.python_or_skip()
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-o", "python_files=check_*.py"]
    done = subprocess.run(
        [
            python,
            "-m",
            "pytest",
            *options,
            "--timeout=120",
            "--rootdir",
            str(npusim.ROOT),
            str(npusim.HERE / "check_device.py"),
        ],
        env=npusim.environment(hbm_bytes=256 << 20),
        cwd=npusim.ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
