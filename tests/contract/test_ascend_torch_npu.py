"""The real torch_npu 2.13.0, in a venv of its own, over the stand-in for CANN: tests/helpers/npu_suite run there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.helpers import cann_standin, torch_npu_wheel
from tests.helpers.torch_npu_wheel import ROOT

pytestmark = pytest.mark.toolchain

SUITE = ROOT / "tests/helpers/npu_suite"


@pytest.fixture(scope="module")
def python() -> str:
    script = ROOT / "tests/helpers/make_npu_venv.sh"
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True, timeout=1500)
    if done.returncode:
        pytest.skip(f"torch_npu 2.13.0 cannot be installed: {done.stderr.strip()[-300:]}")
    try:
        cann_standin.build()
    except (cann_standin.CompilerMissing, torch_npu_wheel.WheelMissing) as error:
        pytest.skip(f"the stand-in for CANN cannot be built: {error}")
    return done.stdout.strip().splitlines()[-1]


def parts() -> dict[str, list[str]]:
    """Name -> pytest arguments. The contract suite of all memory backends runs there too, with torch_npu loaded."""
    own = {path.stem: [str(path), "-o", "python_files=check_*.py"] for path in sorted(SUITE.glob("check_*.py"))}
    return {**own, "contract": [str(ROOT / "tests/contract/test_vmm.py"), "-k", "npu", "-p", "torch_npu"]}


@pytest.mark.parametrize("part", parts())
def test_in_the_npu_venv(python: str, part: str) -> None:
    # Two pytest runs must not share one cache folder; torch_npu's own warnings are not ours to mend.
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--timeout=120"]
    done = subprocess.run(
        [python, "-m", "pytest", *options, "--rootdir", str(ROOT), *parts()[part]],
        # Blocking: an operator's failure belongs to the line that called it.
        env={**cann_standin.environment(devices=4, hbm_bytes=64 << 20), "ASCEND_LAUNCH_BLOCKING": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
