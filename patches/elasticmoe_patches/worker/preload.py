"""What a standby imports before it is needed."""

from __future__ import annotations

import logging

from elasticmoe_patches.demote import demoted
from elasticmoe_patches.plugin import install_for_process, report_hooks

logger = logging.getLogger(__name__)


def preload() -> None:
    """Import what a scheduler imports, also what it imports only when it starts; nothing here may start a thread or
    touch a device."""
    install_for_process("standby")
    report_hooks("standby")
    import sglang.srt.constrained.xgrammar_backend
    import sglang.srt.distributed.device_communicators.custom_all_reduce
    import sglang.srt.dllm.algorithm
    import sglang.srt.layers.moe.fused_moe_triton.layer
    import sglang.srt.managers.scheduler
    import sglang.srt.model_loader.loader

    with demoted("sglang.srt.models.registry", logging.WARNING) as skipped:  # each by its name
        import sglang.srt.models.registry  # every model: seconds that a joining rank need not wait for
    logger.debug("%d of SGLang's model files cannot be imported on this machine", skipped.count)

    if tree_core() == "rust":
        import sglang.srt.mem_cache.rust_tree_core.adapter  # noqa: F401


def tree_core() -> str:
    """The core that SGLang would select for its radix cache. The Rust core's library does not load everywhere, and
    importing its adapter without need would end every rank there."""
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.unified_cache.tree_core_registry import select_tree_core_backend

    plain = CacheInitParams(disable=False, req_to_token_pool=None, token_to_kv_pool_allocator=None, page_size=1)
    return str(select_tree_core_backend(plain))
