"""The CUDA kernels in Triton's interpreter on CPU against the float64 reference.

In child processes: whether Triton interprets or compiles is fixed when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).parent.parent / "helpers" / "triton_interpreter.py"


@pytest.mark.parametrize("part", ["route", "float16", "bfloat16", "fp8"])
def test_kernels_equal_the_reference(part):
    pytest.importorskip("triton")
    child = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", str(CHILD), part],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-4000:]
    cases = json.loads(child.stdout)
    assert cases
    # `not <=` also catches NaN: outputs and unnamed slots are filled with it beforehand.
    wrong = [c for c in cases if not c["error"] <= c["limit"]]
    assert not wrong, wrong
