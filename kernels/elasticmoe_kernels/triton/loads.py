"""Kernels that Triton loads, counted from a moment on.

A kernel's first use compiles it, unless the cache on disk has it, and loads its module, which waits for what runs on
the device. After a warm-up nothing should be left to load. Modules that are not Triton's (cuBLAS, PyTorch's own
kernels, C++ kernels that SGLang compiles) are not seen here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from triton import knobs


class KernelLoads:
    """Hears of every kernel that this process loads, from any thread.

    Attributes:
        before: names of those loaded before `report` was called, each as often as it was loaded.
    """

    def __init__(self) -> None:
        self.before: list[str] = []
        self._told: Callable[[str], None] | None = None
        self._described = threading.local()
        self._next = knobs.runtime.jit_post_compile_hook
        knobs.runtime.jit_post_compile_hook = self._compiled
        knobs.runtime.kernel_load_end_hook.add(self._loaded)

    def report(self, told: Callable[[str], None]) -> None:
        """From now on call `told` with each kernel: its name and, where it is known, its specialisation."""
        self._told = told

    def close(self) -> None:
        knobs.runtime.kernel_load_end_hook.remove(self._loaded)
        knobs.runtime.jit_post_compile_hook = self._next

    def _compiled(self, **described: Any) -> Any:
        self._described.text = _describe(described["fn"].name, described["compile"])  # this thread loads it next
        return self._next(**described) if self._next is not None else None

    def _loaded(self, _module: Any, _function: Any, name: str, _metadata: Any, _hash: str) -> None:
        text, self._described.text = getattr(self._described, "text", ""), ""
        kernel = text if name in text else name  # a kernel may have been compiled earlier and loaded only now
        if self._told is None:
            self.before.append(kernel)
        else:
            self._told(kernel)


def _describe(name: str, compiled: Mapping[str, Any]) -> str:
    """`name[warps=4, ARGUMENT=constant, …, aligned: ARGUMENT …]`: what Triton compiled the kernel for."""
    arguments = list(compiled["signature"])

    def called(path: tuple[int, ...]) -> str:
        return ".".join([str(arguments[path[0]]), *map(str, path[1:])])

    fixed = "".join(f", {called(path)}={value}" for path, value in compiled["constants"].items())
    aligned = " ".join(called(path) for path, marks in compiled["configs"][0].items() if marks)
    return f"{name}[warps={compiled['num_warps']}{fixed}, aligned: {aligned}]"
