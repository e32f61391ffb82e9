"""Batch preparation without pinned memory."""

from __future__ import annotations

from elasticmoe_patches.spec import WORKERS, Hooks

HOOKS = hook = Hooks(__name__, WORKERS, scope="platform")


@hook(
    "attribute",
    "_is_cpu: bool",
    expires="It uses the platform's is_pin_memory_available as the rest of the file does.",
)
def cpu_flag(current: bool) -> bool:
    """prepare_mlp_sync_batch asks for pinned memory, which needs an accelerator's driver, unless this is set; SGLang
    sets it only for its own CPU engine."""
    return True
