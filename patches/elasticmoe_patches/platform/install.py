"""What a scheduler process on the CPU platform installs, before it builds its model."""

from __future__ import annotations


def install() -> None:
    """Register with SGLang's official points, then put the platform's hooks in place; a mismatch ends the process."""
    from elasticmoe_patches import preflight
    from elasticmoe_patches.catalogue import select
    from elasticmoe_patches.platform import sdpa_backend
    from elasticmoe_patches.platform.cpu import DISPATCH_KEY
    from elasticmoe_patches.srt.layers.moe import unquant
    from elasticmoe_sglang.errors import HookError

    sdpa_backend.register()
    unquant.register(DISPATCH_KEY)
    try:
        preflight.install(select("rank", ("platform", "both")), "rank")
    except HookError as error:
        preflight.fail_closed(error)
