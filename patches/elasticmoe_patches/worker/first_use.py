"""Kernels that a rank on a GPU uses for the first time once it serves: in its log, and counted in the status."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from elasticmoe_sglang.wire.to_coordinator import KernelLoaded

if TYPE_CHECKING:
    from elasticmoe_kernels.triton.loads import KernelLoads
    from elasticmoe_patches.worker.worker import Worker

logger = logging.getLogger(__name__)

_LONGEST_NAME = 500


def watch(worker: Worker, loads: KernelLoads) -> None:
    """The rank is warm: from here on every kernel that Triton loads is reported."""
    loaded = Counter(kernel.partition("[")[0] for kernel in loads.before)
    names = ", ".join(f"{name} x {count}" for name, count in sorted(loaded.items()))
    logger.info("rank %d: %d kernels loaded before serving: %s", worker.rank, loaded.total(), names)
    loads.report(partial(_used, worker))


def _used(worker: Worker, kernel: str) -> None:
    logger.warning("rank %d: a kernel was loaded while serving: %s", worker.rank, kernel)
    worker.agent.post(KernelLoaded(rank=worker.rank, kernel=kernel[:_LONGEST_NAME]))
