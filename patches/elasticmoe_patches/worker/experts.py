"""What the MoE methods of all weight formats have in common."""

from __future__ import annotations

from typing import Any

from elasticmoe_sglang.errors import UnsupportedFeature

# SGLang registers them with a layer as parameters by name; no class of its declares them.
_SCALES = {"w13_scale": "w13_weight_scale_inv", "w2_scale": "w2_weight_scale_inv"}
_BIASES = {"w13_bias": "w13_weight_bias", "w2_bias": "w2_weight_bias"}


def run_experts(method: Any, dispatch_output: Any, w13: Any, w2: Any, **more: Any) -> Any:
    """StandardDispatchOutput (hidden [tokens, hidden]) -> StandardCombineInput of the same shape.

    Expert ids are those of this rank's slots, -1 for experts elsewhere. The model leaves `routed_scaling_factor` to
    the MoE method on GPUs, and multiplies by it itself elsewhere.

    Args:
        method: SGLang's method of the layer, with `moe_runner_config` and `with_bias`.
        w13, w2, more: of all slots, by name what `scales_of` or `biases_of` found: see `moe_experts`.

    Raises:
        UnsupportedFeature: the experts are neither of plain SwiGLU nor like gpt-oss's.
    """
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    from elasticmoe_kernels import moe_experts

    config = method.moe_runner_config
    gated = config.activation == "silu" and config.is_gated and not config.apply_router_weight_on_input
    if not gated or method.with_bias != ("clamped" in more):
        raise UnsupportedFeature(
            "the MoE kernels compute experts of SwiGLU without biases only, and gpt-oss's",
            hint="docs/models.md lists the models that are served.",
        )
    weights, ids, _ = dispatch_output.topk_output
    if dispatch_output.hidden_states.is_cuda and config.routed_scaling_factor not in (None, 1.0):
        weights = weights * config.routed_scaling_factor
    output = moe_experts(dispatch_output.hidden_states, w13, w2, ids, weights, **more)
    return StandardCombineInput(hidden_states=output)


def scales_of(layer: Any) -> dict[str, Any]:
    """The scales of a FusedMoE's block-quantised weights, [slots, ...] float32, by argument of `moe_experts`; nothing
    where the weights are not quantised."""
    found = {name: getattr(layer, parameter, None) for name, parameter in _SCALES.items()}
    return {name: scale for name, scale in found.items() if scale is not None}


def biases_of(layer: Any) -> dict[str, Any]:
    """The biases of a FusedMoE's unquantised experts, [slots, ...] float32, and what clamps their SwiGLU, by argument
    of `moe_experts`; nothing where SwiGLU is plain."""
    config = layer.moe_runner_config
    if config.gemm1_alpha is None or config.gemm1_clamp_limit is None:
        return {}
    biases = {name: getattr(layer, parameter) for name, parameter in _BIASES.items()}
    return {**biases, "clamped": (config.gemm1_alpha, config.gemm1_clamp_limit)}
