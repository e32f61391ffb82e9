"""GLM-4.5's shared expert, which SGLang shards over all ranks."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker.own_rows import in_own_rows, init_whole

HOOKS = hook = Hooks(__name__, WORKERS)

_INIT = "(self, hidden_size, intermediate_size, hidden_act, quant_config=None, reduce_results=True, prefix=''"


@hook(
    "around",
    f"Glm4MoeMLP.__init__{_INIT}, tp_rank=None, tp_size=None)",
    also={"0.5.23": f"{_INIT}, *, parallel_group='tp')"},
    expires="SGLANG_SHARED_EXPERT_TP1 applies to GLM-4.5 as to DeepSeek.",
)
def around_init(original: Any, self: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
    """A shared expert is held whole: a shard would leave with its rank."""
    init_whole(original, self, *args, prefix=prefix, **kwargs)


@hook(
    "around",
    "Glm4MoeSparseMoeBlock._forward_shared_experts(self, hidden_states)",
    expires="SGLANG_SHARED_EXPERT_TP1 applies to GLM-4.5 as to DeepSeek.",
)
def around_shared(original: Any, self: Any, hidden_states: Any) -> Any:
    """Each rank computes its own tokens' shared expert, so that the sum over the ranks counts it once."""
    return in_own_rows(lambda rows: original(self, rows), hidden_states)
