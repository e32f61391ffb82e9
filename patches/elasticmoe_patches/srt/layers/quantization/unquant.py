"""Unquantised MoE experts through this project's kernels: for an elastic server, and always on the CPU platform."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.srt.layers.moe.moe_runner import ascend
from elasticmoe_patches.worker.experts import biases_of, run_experts

HOOKS = hook = Hooks(__name__, WORKERS)


# forward_native too: SGLANG_FORCE_FUSED_OP_BACKEND selects it, and it is the method that serves float32 on a GPU.
@hook(
    "replace",
    "UnquantizedFusedMoEMethod.forward_native(self, layer, dispatch_output)",
    expires="SGLang's fused MoE takes strided expert weights.",
)
@hook(
    "replace",
    "UnquantizedFusedMoEMethod.forward_cuda(self, layer, dispatch_output)",
    expires="SGLang's fused MoE takes strided expert weights.",
)
def forward(self: Any, layer: Any, dispatch_output: Any) -> Any:
    """Expert columns are strided and partly unmapped; SGLang's MoE asserts contiguous weights, or reads all.

    `self` is the UnquantizedFusedMoEMethod, `layer` the FusedMoE; the rest is `run_experts`'s.
    `fused_moe_native.moe_forward_native`, which SGLang uses on CPUs, cannot take ids of -1.
    """
    return run_experts(self, dispatch_output, layer.w13_weight, layer.w2_weight, **biases_of(layer))


@hook(
    "around",
    "UnquantizedFusedMoEMethod.create_weights(self, layer, num_experts, hidden_size, "
    "intermediate_size_per_partition, params_dtype, with_bias=False, **extra_weight_attrs)",
    expires="FusedMoE takes its weights' storage as an argument.",
)
def around_create_weights(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Expert weights belong to the HMM; the layer must not allocate its own."""
    import torch

    with torch.device("meta"):
        original(self, *args, **kwargs)


@hook(
    "before",
    "UnquantizedFusedMoEMethod.create_moe_runner(self, layer, moe_runner_config)",
    expires="SGLang's NPU runner core takes weights with any stride between experts.",
)
def before_create_moe_runner(self: Any, layer: Any, moe_runner_config: Any) -> None:
    """On an NPU the layer's runner core must read expert columns; SGLang's reads one contiguous weight."""
    from sglang.srt.utils import is_npu

    if is_npu():
        ascend.register()
