"""This project's Triton-Ascend kernels in a server: lowered by triton-ascend, their Linalg run on the host's memory.

A launch runs at once, as an operator here does. A slot without memory that a kernel read would end the process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npusim_device.dispatch import CHECKED, count, device_of, note_address

WANTED = "NPUSIM_TRITON_ASCEND"
"""1: the kernels of `elasticmoe_kernels.ascend` run. They need triton-ascend's venv and LLVM, which tests install."""
_KERNELS = ("gather_rows", "grouped_gemm", "swiglu", "combine")
_CUBE, _VECTOR = 3, 5
"""Cores: few, and odd, so that rows and tiles do not divide evenly among them."""


def install() -> None:
    """Put the lowered kernels in the places of Triton's."""
    from elasticmoe_kernels.ascend import moe

    for name in _KERNELS:
        setattr(moe, name, _Kernel(name))
    moe.cores_of = lambda device: moe.Cores(cube=_CUBE, vector=_VECTOR)


class _Kernel:
    """`kernel[grid](*arguments, **constants)` on NPU tensors."""

    def __init__(self, name: str) -> None:
        from tests.helpers.triton_ascend.launch import LinalgKernel

        self._name = f"triton-ascend::{name}"
        self._lowered = LinalgKernel(name)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        launch = self._lowered[grid]

        def run(*arguments: Any, **constants: int) -> None:
            device_of(arguments, self._name)
            count(self._name)
            CHECKED[self._name] = "this project's kernel, lowered by triton-ascend, its Linalg run on the host"
            if self._name.endswith("grouped_gemm"):
                note_address(f"{self._name}.weight", arguments[1])
            launch(*arguments, **constants)

        return run
