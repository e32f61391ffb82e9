"""Replaying a captured graph."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker.worker import current_worker

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "before",
    "FullCudaGraphBackend.replay(self, shape_key, static_forward_batch, **kwargs)",
    expires="SGLang lets a distributed backend act before a graph is replayed.",
)
def before_replay(self: Any, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> None:
    """Ranks that share a device replay a graph with collectives only when all of them have reached it: a kernel that
    waits for a peer can keep that peer's driver calls waiting.
    """
    windows = current_worker().cuda
    if windows is not None:
        windows.rendezvous_for_replay()
