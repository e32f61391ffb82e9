"""Qwen2-MoE's shared expert, which SGLang shards over all ranks."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker.own_rows import in_own_rows, init_whole

HOOKS = hook = Hooks(__name__, WORKERS)

_INIT = "(self, hidden_size, intermediate_size, hidden_act, quant_config=None, reduce_results=True, prefix=''"
_GATE = "(hidden_states, gate_weight, shared_output, final_hidden_states)"


@hook(
    "around",
    f"Qwen2MoeMLP.__init__{_INIT}, tp_rank=None, tp_size=None)",
    also={"0.5.23": f"{_INIT}, *, parallel_group='tp')"},
    expires="SGLANG_SHARED_EXPERT_TP1 applies to Qwen2-MoE as to DeepSeek.",
)
def around_init(original: Any, self: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
    """A shared expert is held whole: a shard would leave with its rank."""
    init_whole(original, self, *args, prefix=prefix, **kwargs)


@hook(
    "around",
    "Qwen2MoeSparseMoeBlock._forward_shared_experts(self, hidden_states, apply_gate=True)",
    expires="SGLANG_SHARED_EXPERT_TP1 applies to Qwen2-MoE as to DeepSeek.",
)
def around_shared(original: Any, self: Any, hidden_states: Any, apply_gate: bool = True) -> Any:
    """Each rank computes its own tokens' shared expert, so that the sum over the ranks counts it once."""
    return in_own_rows(lambda rows: original(self, rows, apply_gate=apply_gate), hidden_states)


@hook(
    "replace",
    f"fused_gate_sigmoid_mul_add{_GATE}",
    scope="platform",
    expires="SGLang's operator for it runs on CPU tensors.",
)
def add_gated(hidden_states: Any, gate_weight: Any, shared_output: Any, final_hidden_states: Any) -> None:
    """SGLang's own is a Triton kernel."""
    gate = (hidden_states @ gate_weight).sigmoid().unsqueeze(-1)
    final_hidden_states.addcmul_(gate, shared_output)
