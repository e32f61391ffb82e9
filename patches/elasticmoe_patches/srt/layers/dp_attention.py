"""Row copies of data-parallel attention on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable

from elasticmoe_patches.spec import WORKERS, Hooks

HOOKS = hook = Hooks(__name__, WORKERS, scope="platform")


@hook(
    "attribute",
    "memcpy_func(dst, src, dim, offset, sz, offset_src)",
    expires="SGLang asks the platform instead of SGLANG_USE_CPU_ENGINE.",
)
def memcpy_func(current: Callable[..., None]) -> Callable[..., None]:
    """Rows are copied into and out of the gathered buffer by a Triton kernel unless SGLANG_USE_CPU_ENGINE is set, which
    needs sgl_kernel.

    Replaced by SGLang's own PyTorch copy.
    """
    from sglang.srt.layers.dp_attention import memcpy_cpu

    chosen: Callable[..., None] = memcpy_cpu
    return chosen
