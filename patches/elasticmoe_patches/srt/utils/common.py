"""Object broadcasts of a rank that is alone, and the end of the process tree (mirrors sglang/srt/utils/common.py)."""

from __future__ import annotations

import os
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


def before_kill_process_tree(parent_pid: int | None, *_args: Any, **_kwargs: Any) -> None:
    """The server's own processes end now."""
    from elasticmoe_patches.services import server_ends

    if parent_pid in (None, os.getpid()):
        server_ends()


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
    HookSpec(
        target="sglang.srt.utils.common.kill_process_tree",
        kind="before",
        hook=f"{__name__}:before_kill_process_tree",
        signature="(parent_pid, include_parent=True, skip_pid=None, wait_timeout=60)",
        reason="However SGLang ends the server: the coordinator must not take the end of the HMM and the IMM for a "
        "fault and start them anew.",
        expires="SGLang tells plugins that it shuts down.",
        processes=frozenset(("main",)),
    ),
)
