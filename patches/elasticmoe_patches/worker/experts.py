"""What the MoE methods of all weight formats have in common."""

from __future__ import annotations

from typing import Any

from elasticmoe_sglang.errors import UnsupportedFeature

# SGLang registers them with a layer as parameters by name; no class of its declares them.
_SCALES = {"w13_scale": "w13_weight_scale_inv", "w2_scale": "w2_weight_scale_inv"}


def run_experts(method: Any, dispatch_output: Any, w13: Any, w2: Any, **scales: Any) -> Any:
    """StandardDispatchOutput (hidden [tokens, hidden]) -> StandardCombineInput of the same shape.

    Expert ids are those of this rank's slots, -1 for experts elsewhere. The model leaves `routed_scaling_factor` to
    the MoE method on GPUs, and multiplies by it itself elsewhere.

    Args:
        method: SGLang's method of the layer, with `moe_runner_config` and `with_bias`.
        w13, w2, scales: of all slots, the scales by name: see `moe_experts`.

    Raises:
        UnsupportedFeature: the experts are not plain SwiGLU.
    """
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    from elasticmoe_kernels import moe_experts

    config = method.moe_runner_config
    if config.activation != "silu" or not config.is_gated or config.apply_router_weight_on_input or method.with_bias:
        raise UnsupportedFeature(
            "the MoE kernels compute SwiGLU experts without bias only",
            hint="Qwen3-MoE, DeepSeek-V2 and V3 are such models.",
        )
    weights, ids, _ = dispatch_output.topk_output
    if dispatch_output.hidden_states.is_cuda and config.routed_scaling_factor not in (None, 1.0):
        weights = weights * config.routed_scaling_factor
    output = moe_experts(dispatch_output.hidden_states, w13, w2, ids, weights, **scales)
    return StandardCombineInput(hidden_states=output)


def scales_of(layer: Any) -> dict[str, Any]:
    """The scales of a FusedMoE's block-quantised weights, [slots, ...] float32, by argument of `moe_experts`; nothing
    where the weights are not quantised."""
    found = {name: getattr(layer, parameter, None) for name, parameter in _SCALES.items()}
    return {name: scale for name, scale in found.items() if scale is not None}
