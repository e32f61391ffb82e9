"""The stand-in for CANN inside the test process, or a skip that says why not."""

from __future__ import annotations

import ctypes
import os

import pytest

from tests.helpers import cann_standin, torch_npu_wheel


def standin_or_skip() -> ctypes.CDLL:
    """Loads the stand-in; from then on `CDLL("libascendcl.so")` finds it by its name."""
    try:
        folder = cann_standin.build()
    except (cann_standin.CompilerMissing, torch_npu_wheel.WheelMissing) as error:
        pytest.skip(f"the stand-in for CANN cannot be built: {error}")
    os.environ.setdefault("CANN_STANDIN_DEVICES", "4")
    return ctypes.CDLL(str(folder / cann_standin.CODE))
