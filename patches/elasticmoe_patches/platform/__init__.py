"""Entry point of the out-of-tree CPU platform (group ``sglang.srt.platforms``).

SGLang calls :func:`activate` in every process before it decides what hardware it runs on. Where an accelerator is
present the answer is None and SGLang runs as if this package were not installed.
"""

from __future__ import annotations

import importlib.util
import os

PLATFORM_CLASS = "elasticmoe_patches.platform.cpu.ElasticCpuPlatform"


def activate() -> str | None:
    """Qualified name of the platform class, or None where SGLang has hardware (or a CPU engine) of its own."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None  # the user asked for SGLang's own CPU engine, which needs a CPU build of sgl_kernel
    if accelerator() is not None:
        return None
    from elasticmoe_patches.platform import environment, torchvision_ops

    environment.set_defaults()
    torchvision_ops.declare_if_unloadable()
    return PLATFORM_CLASS


def accelerator() -> str | None:
    """Name of an accelerator that SGLang would use, or None. Creates no context on any device."""
    import torch

    # device_count() asks NVML first, so a process that only looks can still fork afterwards.
    if torch.cuda.device_count() > 0:
        return "cuda"
    if torch.xpu.is_available():
        return "xpu"
    if torch.backends.mps.is_available():
        return "mps"
    for name in ("npu", "musa", "hpu"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available():
            return name
    if importlib.util.find_spec("habana_frameworks") is not None:
        return "hpu"
    return None
