"""Puts the lowered Linalg in a Triton kernel's place: `kernel[(cores,)](*arguments, BLOCK=...)` on CPU tensors."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.helpers.triton_ascend.execute import KERNELS, TYPES, Compiled, Job, lower


def argument_names(kernel: str) -> list[str]:
    """The kernel's parameters, read off its file: importing it would want Triton."""
    tree = ast.parse((KERNELS / f"{kernel}.py").read_text())
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == kernel)
    return [argument.arg for argument in function.args.args]


def job_for(kernel: str, types: list[str], constants: dict[str, int]) -> Job:
    """The job for arguments of these Triton types, in the kernel's order, constants last."""
    names = argument_names(kernel)
    assert len(names) == len(types) + len(constants), (names, types, constants)
    return Job(kernel=kernel, signature=tuple(zip(names, types, strict=False)), constants=tuple(constants.items()))


def _type(value: torch.Tensor | int) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "i32" if value < 2**31 else "i64"  # as Triton chooses


@dataclass
class LinalgKernel:
    """Stands for one @triton.jit kernel. `launches` records grid and constants of each launch."""

    name: str
    launches: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    _compiled: dict[Job, Compiled] = field(default_factory=dict)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: torch.Tensor | int, **constants: int) -> None:
            job = job_for(self.name, [_type(value) for value in arguments], constants)
            if job not in self._compiled:
                self._compiled[job] = Compiled(lower([job])[job])
            self.launches.append((grid[0], constants))
            self._compiled[job](grid[0], *arguments)

        return launch
