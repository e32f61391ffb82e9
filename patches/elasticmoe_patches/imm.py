"""The IMM's program, `python -m elasticmoe_patches.imm BACKEND`: import everything a rank needs, then fork standbys.

With the backend "cuda" it imports nothing, and its children become programs of their own
(docs/adr/0009-standbys-on-a-gpu.md).
"""

from __future__ import annotations

import logging
import os
import sys

from elasticmoe_patches.worker.preload import preload
from elasticmoe_patches.worker.program import become_standby, never_forked, worker_main
from elasticmoe_sglang.imm.server import ImmServer, die_with_parent
from elasticmoe_sglang.runtime import current_runtime
from elasticmoe_sglang.worker.idle import create_doorbells

logger = logging.getLogger("elasticmoe_patches.imm")  # this file is __main__


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
        ImmServer(path, never_forked, standbys=config.standbys, capacity=capacity, become=become_standby).serve()
    preload()
    ImmServer(path, worker_main, standbys=config.standbys, capacity=capacity).serve()


if __name__ == "__main__":
    main()
