"""Outputs name the process that sent them."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.senders import tag
from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker.worker import current_worker

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "around",
    "_GenerationStreamAccumulator.to_payload(self, *, dp_rank, is_idle_batch)",
    expires="SGLang's outputs name the process that sent them.",
)
def around_to_payload(original: Any, self: Any, *, dp_rank: int, is_idle_batch: bool) -> Any:
    """Adds the worker's incarnation to the rank of an output; see `senders.py`."""
    incarnation = current_worker().join_spec.incarnation
    return original(self, dp_rank=tag(dp_rank, incarnation), is_idle_batch=is_idle_batch)
