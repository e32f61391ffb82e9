"""Replaying a captured graph (mirrors sglang/srt/model_executor/runner_backend/full_cuda_graph_backend.py)."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec


def before_replay(self: Any, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> None:
    """Hosts of ranks that share a device meet: the graph's collectives wait for each other on that device."""
    from elasticmoe_patches.worker.worker import current_worker

    windows = current_worker().cuda
    if windows is not None:
        windows.rendezvous_for_replay()


HOOKS: tuple[HookSpec, ...] = (
    HookSpec(
        target="sglang.srt.model_executor.runner_backend.full_cuda_graph_backend.FullCudaGraphBackend.replay",
        kind="before",
        hook=f"{__name__}:before_replay",
        signature="(self, shape_key, static_forward_batch, **kwargs)",
        reason="Ranks that share a device launch a graph with collectives only when all of them have reached it: a "
        "kernel that waits for a peer can keep that peer's driver calls waiting.",
        expires="SGLang lets a distributed backend act before a graph is replayed.",
        processes=frozenset(("rank", "standby")),
    ),
)
