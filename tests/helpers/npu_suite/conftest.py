"""Runs in .venv-npu, where torch_npu is the real one and CANN the stand-in; started by test_ascend_torch_npu.py."""

import os

import pytest
import torch
import torch_npu  # noqa: F401  (registers the device)


@pytest.fixture(autouse=True)
def npu_zero():
    assert os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0"
    torch.npu.set_device(0)
