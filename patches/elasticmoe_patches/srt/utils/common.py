"""Object broadcasts of a rank that is alone."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
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
