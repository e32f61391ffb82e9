"""Batch preparation without pinned memory (mirrors ``sglang/srt/model_executor/forward_batch_info.py``)."""

from __future__ import annotations

from elasticmoe_patches.spec import HookSpec


def cpu_flag(current: bool) -> bool:
    """The module's flag for "tensors live in host memory"."""
    return True


HOOKS: tuple[HookSpec, ...] = (
    HookSpec(
        target="sglang.srt.model_executor.forward_batch_info._is_cpu",
        kind="attribute",
        hook=f"{__name__}:cpu_flag",
        signature="bool",
        reason="prepare_mlp_sync_batch asks for pinned memory, which needs an accelerator's driver, unless this is "
        "set; SGLang sets it only for its own CPU engine.",
        expires="It uses the platform's is_pin_memory_available as the rest of the file does.",
        scope="platform",
        processes=frozenset(("rank", "standby")),
    ),
)
