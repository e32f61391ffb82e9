"""What tests need that run several ranks on one GPU."""

from __future__ import annotations

import pytest
import torch

from elasticmoe_patches.device import mps_runs


def need_shared_gpu() -> None:
    """Skips the test where there is no NVIDIA GPU, or no MPS on it."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if not mps_runs():
        pytest.skip("two ranks on a GPU need MPS: scripts/gpu_all.sh starts it")
