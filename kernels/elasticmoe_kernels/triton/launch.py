"""What every launch shares: powers of two, programmatic dependent launch, the number of multiprocessors."""

from __future__ import annotations

import functools

import torch


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def pdl_options(pdl: bool) -> dict[str, bool]:
    """Launch option for programmatic dependent launch: the kernel may start before the one in front of it ends.

    Every kernel here that is started so begins with `gdc_wait`, or reads before it only what was complete earlier.
    """
    return {"launch_pdl": True} if pdl else {}


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Hopper or newer. False on CPU, where the kernels run in Triton's interpreter."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 on CPU, so that persistent kernels loop in the interpreter too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
