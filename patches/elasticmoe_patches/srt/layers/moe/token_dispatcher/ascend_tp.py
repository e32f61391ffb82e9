"""SGLang's NPU dispatcher with rows of inactive ranks, whose expert ids are -1."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "after",
    "AscendTPDispatcher.__init__(self, moe_runner_config)",
    expires="SGLang's NPU dispatcher drops pairs whose expert id is -1.",
)
def after_init(_result: Any, self: Any, moe_runner_config: Any) -> None:
    """On an NPU, an expert that is nowhere takes the pairs of inactive ranks' rows.

    It is one more than there are; the slot table ends with -1 for it.
    """
    self.num_experts = moe_runner_config.num_experts + 1


@hook(
    "before",
    "AscendTPDispatcher.dispatch(self, hidden_states, topk_output)",
    expires="SGLang's NPU dispatcher drops pairs whose expert id is -1.",
)
def before_dispatch(self: Any, hidden_states: Any, topk_output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """On an NPU, sends expert id -1 to the expert that is nowhere: the routing operator wants ids from 0 on."""
    import torch

    ids = topk_output.topk_ids
    named = torch.where(ids < 0, self.num_experts - 1, ids)
    return (self, hidden_states, topk_output._replace(topk_ids=named)), {}
