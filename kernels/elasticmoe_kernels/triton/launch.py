"""What every launch shares: powers of two, programmatic dependent launch, the number of multiprocessors."""

from __future__ import annotations

import functools

import torch
import triton.language as tl

TL_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float8_e4m3fn: tl.float8e4nv}
"""Element types that the kernels take weights in. Weights and their scales are passed as addresses (integers): slot 0
may have no memory on this rank, and Triton asks the driver about every pointer argument, which fails there."""


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def pdl_options(pdl: bool) -> dict[str, bool]:
    """Launch option for programmatic dependent launch: the kernel may start before the one in front of it ends.

    Every kernel here that is started so begins with `gdc_wait`, or reads before it only what was complete earlier.
    """
    return {"launch_pdl": True} if pdl else {}


def address(tensor: torch.Tensor) -> int:
    """What a kernel gets for weights and their scales instead of the tensor: see TL_TYPES."""
    return tensor.data_ptr()


@functools.cache
def supports_pdl(device: torch.device) -> bool:
    """Hopper or newer. False on CPU, where the kernels run in Triton's interpreter."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors; 2 on CPU, so that persistent kernels loop in the interpreter too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
