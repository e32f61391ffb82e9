"""Expert columns under SGLang's MoE layer.

Every rank builds the layer with room for all experts, one slot an expert (docs/adr/0001-slots-are-columns.md), on the
meta device: nothing is allocated. The loader then binds the weights to the rank's column space, where only the slots of
its own columns are mapped, and the dispatcher's table sends every other expert id to -1.
"""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks

HOOKS = hook = Hooks(__name__, WORKERS)

_INIT = (
    "(self, num_experts, hidden_size, intermediate_size, layer_id, top_k=None, "
    "num_fused_shared_experts=0, params_dtype=None, reduce_results=False, quant_config=None, prefix='', "
    "activation='silu', apply_router_weight_on_input=False, use_presharded_weights=False, inplace=True, "
    "no_combine=False, routed_scaling_factor=None, gemm1_alpha=None, gemm1_beta=None, gemm1_clamp_limit=None, "
    "swiglu_limit=None, use_weight_loader_fused=False, with_bias=False, routing_method_type=None, is_gated=True, "
    "gate_up_interleaved=True, enable_qwen35_fp8_deferred_finalize=False, quant_method=None"
)


class _AllExpertsHere:
    """SGLang's parallel context, except that this rank seems to hold all experts."""

    moe_ep_size = 1
    moe_ep_rank = 0

    def __init__(self, parallel: Any) -> None:
        self._parallel = parallel

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parallel, name)


@hook(
    "around",
    f"FusedMoE.__init__{_INIT})",
    also={"0.5.23": f"{_INIT}, uses_expert_location=True)"},
    expires="FusedMoE takes its expert placement as an argument.",
)
def around_init(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """A slot for every expert on every rank, and no divisibility of experts by ranks."""
    from sglang.srt.layers.moe.fused_moe_triton import layer

    real = layer.get_parallel
    layer.get_parallel = lambda: _AllExpertsHere(real())
    try:
        original(self, *args, **kwargs)
    finally:
        layer.get_parallel = real
    # What the forward pass asks for; weights and their loader keep one slot an expert.
    self.moe_ep_size = real().moe_ep_size
    self.moe_ep_rank = real().moe_ep_rank


@hook(
    "around",
    "FusedMoE.weight_loader_fused(self, param, loaded_weight, weight_name, shard_id)",
    scope="both",
    expires="FusedMoE loads a tensor of all experts expert by expert, and only those that are wanted.",
)
def around_weight_loader_fused(
    original: Any, self: Any, param: Any, loaded_weight: Any, weight_name: str, shard_id: str
) -> None:
    """A tensor of all experts fills only the columns that are read here, since other slots have no memory; and the
    kernels want the gate projection's rows in front of the up projection's, not between them."""
    if self.moe_runner_config.gemm1_alpha is None:
        original(self, param, loaded_weight, weight_name, shard_id)
        return
    from elasticmoe_patches.worker.stacked import fill_stacked

    fill_stacked(param, loaded_weight, weight_name, interleaved=shard_id == "w13")
