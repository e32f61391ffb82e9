"""Object broadcasts of a rank that is alone, and the end of the process tree."""

from __future__ import annotations

import os
from typing import Any

from elasticmoe_patches.spec import MAIN, WORKERS, Hooks
from elasticmoe_patches.worker.worker import current_worker

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "around",
    "broadcast_pyobj(data, rank, dist_group=None, src=0, force_cpu_device=True)",
    expires="SGLang broadcasts objects through torch.distributed.",
)
def around_broadcast_pyobj(original: Any, data: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
    """The broadcast sends sizes first; a lone rank that is not the source would return nothing.

    A joining rank that boots alone keeps its own data (the seed), whatever the source rank is.
    """
    if current_worker().region.is_solo:
        return data or []
    result: list[Any] = original(data, *args, **kwargs)
    return result


@hook(
    "before",
    "kill_process_tree(parent_pid, include_parent=True, skip_pid=None, wait_timeout=60)",
    expires="SGLang tells plugins that it shuts down.",
    processes=MAIN,
)
def before_kill_process_tree(parent_pid: int | None, *_args: Any, **_kwargs: Any) -> None:
    """However SGLang ends the server: the coordinator must not take the end of the HMM and the IMM for a fault and
    start them anew."""
    from elasticmoe_patches.services import server_ends

    if parent_pid in (None, os.getpid()):
        server_ends()
