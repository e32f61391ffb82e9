"""Environment defaults of the CPU platform. A variable that the user set is never touched."""

from __future__ import annotations

import os
from collections.abc import Sequence

from elasticmoe_sglang.cpu_bind import usable_cores


def set_defaults() -> None:
    """Defaults that every process of the server needs; children inherit them."""
    # The shared-memory broadcaster spins and waits for every rank at start; the process group is used instead.
    os.environ.setdefault("SGLANG_USE_MESSAGE_QUEUE_BROADCASTER", "false")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # SGLang compiles routing and sampling helpers at their first call and again for new shapes. Without an accelerator
    # that means a C++ compiler in the middle of serving (29 s for the first DeepSeek-V2 request on 2 cores) and gains
    # nothing: the helpers are a few element-wise operators.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def set_rank_defaults(ranks: int, bound: Sequence[Sequence[int]] | None = None) -> None:
    """Share the cores among `ranks` scheduler processes of this machine.

    Args:
        bound: the cores of each rank where workers bind themselves, and choose their number of threads.

    SGLang refuses more ranks than NUMA nodes unless SGLANG_CPU_OMP_THREADS_BIND has one entry a rank
    (``utils/numa_utils.py``). Without sgl_kernel the entries are checked but bind nothing, so where workers do not bind
    themselves the thread count is what keeps the ranks from fighting for cores.
    """
    groups = bound
    if groups is None:
        cores = usable_cores()
        per_rank = max(1, len(cores) // ranks)
        groups = [[cores[(rank * per_rank + i) % len(cores)] for i in range(per_rank)] for rank in range(ranks)]
        os.environ.setdefault("OMP_NUM_THREADS", str(per_rank))
    if ranks > 1:
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, g)) for g in groups))
