"""The CUDA kernels in Triton's interpreter on CPU against the float64 reference.

In child processes: whether Triton interprets or compiles is fixed when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

CHILD = Path(__file__).parent.parent / "helpers" / "triton_interpreter.py"


PARTS = ["float16", "bfloat16", "fp8", "biased", "route"]
"""The longest first."""


def run_part(part: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", str(CHILD), part],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip


@pytest.fixture(scope="module")
def children(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The parts that are asked for, two at a time."""
    pytest.importorskip("triton")
    wanted = [item.callspec.params["part"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(2) as pool:
        yield {part: pool.submit(run_part, part) for part in wanted}


@pytest.mark.parametrize("part", PARTS)
def test_kernels_equal_the_reference(children: dict[str, Future[subprocess.CompletedProcess[str]]], part: str) -> None:
    child = children[part].result()
    assert child.returncode == 0, child.stderr[-4000:]
    cases = json.loads(child.stdout)
    assert cases
    # `not <=` also catches NaN: outputs and unnamed slots are filled with it beforehand.
    wrong = [c for c in cases if not c["error"] <= c["limit"]]
    assert not wrong, wrong
