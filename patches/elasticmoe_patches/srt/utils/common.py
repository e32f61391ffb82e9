"""Object broadcasts of a rank that is alone (mirrors sglang/srt/utils/common.py)."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec


def around_broadcast_pyobj(original: Any, data: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Alone, every rank is the source: a booting joining rank keeps its own data (the seed), whoever the source rank
    is."""
    from elasticmoe_patches.worker.worker import current_worker

    if current_worker().region.is_solo:
        return data or []
    result: list[Any] = original(data, *args, **kwargs)
    return result


HOOKS = (
    HookSpec(
        target="sglang.srt.utils.common.broadcast_pyobj",
        kind="around",
        hook=f"{__name__}:around_broadcast_pyobj",
        signature="(data, rank, dist_group=None, src=0, force_cpu_device=True)",
        reason="The broadcast sends sizes first; a lone rank that is not the source would return nothing.",
        expires="SGLang broadcasts objects through torch.distributed.",
        processes=frozenset(("rank", "standby")),
    ),
)
