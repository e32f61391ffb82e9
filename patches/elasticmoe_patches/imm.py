"""The IMM: import everything a rank needs, then fork standbys. The first one of a server may be a fork of the main
process, which has imported most of it; the others are programs, `python -m elasticmoe_patches.imm BACKEND`.

With the backend "cuda" it imports that without CUDA, as far as this machine's packages allow; with "npu" it imports
nothing, and its children become programs of their own (docs/adr/0009-standbys-on-a-gpu.md).
"""

from __future__ import annotations

import logging
import sys

import setproctitle

from elasticmoe_patches.device import survives_fork
from elasticmoe_patches.worker.preload import preload
from elasticmoe_patches.worker.program import become_standby, never_forked, warm_device, worker_main
from elasticmoe_sglang.imm.gpu_imports import FORK_SAFE_THREADS, preload_without_cuda
from elasticmoe_sglang.imm.server import ImmServer
from elasticmoe_sglang.imm.spare import told_to_serve
from elasticmoe_sglang.lifeline import leave_signals_to_main, tie
from elasticmoe_sglang.runtime import current_runtime

TITLE, SPARE_TITLE = "elasticmoe_patches.imm", "elasticmoe spare IMM"

logger = logging.getLogger(TITLE)  # this file is __main__


def serve(backend: str, spare: int | None = None) -> None:
    """Be the IMM until the server ends; with `spare` only once somebody says so there (`SpareImm`)."""
    runtime = current_runtime()
    assert runtime is not None, "the IMM is started by the launcher, which sets its environment"
    paths, config = runtime.paths, runtime.config
    if spare is not None:
        setproctitle.setproctitle(f"{SPARE_TITLE}, importing")
    leave_signals_to_main()
    tie(paths.lifeline)
    log_format = "[%(asctime)s IMM] %(message)s"
    logging.basicConfig(level=logging.INFO, format=log_format, datefmt="%Y-%m-%d %H:%M:%S", force=True)
    forks = survives_fork(backend)
    if forks:
        preload()
    elif backend == "cuda":
        forks = preload_without_cuda(preload)
    if spare is not None:
        setproctitle.setproctitle(SPARE_TITLE)
        if not told_to_serve(spare):
            return
        setproctitle.setproctitle(TITLE)
    ImmServer(
        paths.imm_socket,
        worker_main if forks else never_forked,
        standbys=config.standbys,
        capacity=config.max_ep_size,
        lifeline=paths.lifeline,
        become=None if forks else become_standby,
        warm=warm_device if forks else None,
        fork_safe_threads=FORK_SAFE_THREADS if backend == "cuda" else (),
    ).serve()


if __name__ == "__main__":
    serve(sys.argv[1], *map(int, sys.argv[2:]))
