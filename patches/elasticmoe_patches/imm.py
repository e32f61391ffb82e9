"""The IMM's program, `python -m elasticmoe_patches.imm BACKEND`: import everything a rank needs, then fork standbys.

With the backend "cuda" it imports nothing, and what it forks become programs of their own
(docs/adr/0009-standbys-on-a-gpu.md).
"""

from __future__ import annotations

import logging
import os
import sys

from elasticmoe_patches.worker.program import become_standby, never_here
from elasticmoe_sglang.imm.server import ImmServer, die_with_parent
from elasticmoe_sglang.runtime import current_runtime
from elasticmoe_sglang.worker.idle import create_doorbells

logger = logging.getLogger("elasticmoe_patches.imm")  # this file is __main__


def preload() -> None:
    """Import what a scheduler imports, also what it imports only when it starts; nothing here may start a thread or
    touch a device."""
    from elasticmoe_patches.demote import demoted
    from elasticmoe_patches.plugin import install_for_process, report_hooks

    install_for_process("standby")
    report_hooks("standby")
    import sglang.srt.constrained.xgrammar_backend
    import sglang.srt.distributed.device_communicators.custom_all_reduce
    import sglang.srt.dllm.algorithm
    import sglang.srt.layers.moe.fused_moe_triton.layer
    import sglang.srt.managers.scheduler
    import sglang.srt.mem_cache.rust_tree_core.adapter
    import sglang.srt.model_loader.loader

    with demoted("sglang.srt.models.registry", logging.WARNING) as skipped:  # each by its name
        import sglang.srt.models.registry  # noqa: F401  (every model: seconds that a joining rank need not wait for)
    logger.debug("%d of SGLang's model files cannot be imported on this machine", skipped.count)


def main() -> None:
    die_with_parent()
    if os.getppid() != int(os.environ["ELASTICMOE_DIE_WITH_PARENT"]):
        sys.exit(0)  # the launcher ended before we could ask to end with it
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s IMM] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    runtime = current_runtime()
    assert runtime is not None, "the IMM is started by the launcher, which sets its environment"
    config = runtime.config
    create_doorbells(config.max_ep_size)
    path, capacity = runtime.paths.imm_socket, config.max_ep_size
    if sys.argv[1:] == ["cuda"]:
        ImmServer(path, never_here, standbys=config.standbys, capacity=capacity, become=become_standby).serve()
    preload()
    # SGLang configures logging itself in each process; leave it a clean root logger.
    from elasticmoe_patches.worker.worker import worker_main

    ImmServer(path, worker_main, standbys=config.standbys, capacity=capacity).serve()


if __name__ == "__main__":
    main()
