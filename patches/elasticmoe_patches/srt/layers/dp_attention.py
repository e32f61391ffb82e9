"""Row copies of data-parallel attention on CPU tensors (mirrors ``sglang/srt/layers/dp_attention.py``)."""

from __future__ import annotations

from collections.abc import Callable

from elasticmoe_patches.spec import HookSpec


def memcpy_func(current: Callable[..., None]) -> Callable[..., None]:
    """SGLang's own PyTorch copy instead of its Triton one."""
    from sglang.srt.layers.dp_attention import memcpy_cpu

    chosen: Callable[..., None] = memcpy_cpu
    return chosen


HOOKS: tuple[HookSpec, ...] = (
    HookSpec(
        target="sglang.srt.layers.dp_attention.memcpy_func",
        kind="attribute",
        hook=f"{__name__}:memcpy_func",
        signature="(dst, src, dim, offset, sz, offset_src)",
        reason="Rows are copied into and out of the gathered buffer by a Triton kernel unless SGLANG_USE_CPU_ENGINE is "
        "set, which needs sgl_kernel.",
        expires="SGLang asks the platform instead of SGLANG_USE_CPU_ENGINE.",
        scope="platform",
        processes=frozenset(("rank", "standby")),
    ),
)
