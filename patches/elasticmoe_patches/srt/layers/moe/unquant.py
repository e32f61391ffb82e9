"""Unquantised MoE experts through this project's kernels: on the CPU platform, and on GPUs for an elastic server.

On the CPU ``fused_moe_native.moe_forward_native``, which SGLang uses otherwise, scatters by expert id and so
cannot take the id -1 ("not on this rank") that expert parallelism produces. On GPUs it is installed as a hook, see
``layers/quantization/unquant.py``.
"""

from __future__ import annotations

from typing import Any

from sglang.kernels.fused_op import BaseFusedOp
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from elasticmoe_kernels import moe_experts
from elasticmoe_sglang.errors import UnsupportedFeature


def forward(self: Any, layer: Any, dispatch_output: Any) -> Any:
    """StandardDispatchOutput (hidden [tokens, hidden]) -> StandardCombineInput of the same shape.

    `self` is the UnquantizedFusedMoEMethod, `layer` the FusedMoE. Expert ids are those of this rank's slots, -1 for
    experts elsewhere. As with SGLang's native path, ``routed_scaling_factor`` is left to the model.
    """
    config = self.moe_runner_config
    if config.activation != "silu" or not config.is_gated or config.apply_router_weight_on_input or self.with_bias:
        raise UnsupportedFeature(
            "the MoE kernels compute SwiGLU experts without bias only",
            hint="Qwen3-MoE and DeepSeek-V2 are such models.",
        )
    weights, ids, _ = dispatch_output.topk_output
    output = moe_experts(dispatch_output.hidden_states, layer.w13_weight, layer.w2_weight, ids, weights)
    return StandardCombineInput(hidden_states=output)


def register(dispatch_key: str) -> None:
    """Make `forward` the implementation of unquantised experts on the platform with this dispatch key."""
    BaseFusedOp.register_oot_forward(UnquantizedFusedMoEMethod, forward, dispatch_key)
