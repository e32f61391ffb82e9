"""Block-quantised fp8 experts through this project's kernels: for an elastic server, and always on the CPU platform."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_patches.worker.experts import run_experts, scales_of

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "replace",
    "Fp8MoEMethod.apply(self, layer, dispatch_output)",
    scope="both",
    expires="SGLang's fused MoE takes strided expert weights, and has an fp8 path for CPUs without AMX.",
)
def apply(self: Any, layer: Any, dispatch_output: Any) -> Any:
    """Expert columns are strided and partly unmapped, weights and scales; on the CPU platform SGLang's own is a Triton
    kernel.

    `self` is the Fp8MoEMethod, `layer` the FusedMoE; the rest is `run_experts`'s.
    """
    return run_experts(self, dispatch_output, layer.w13_weight, layer.w2_weight, **scales_of(layer))


@hook(
    "around",
    "Fp8MoEMethod.create_weights(self, layer, num_experts, hidden_size, intermediate_size_per_partition, "
    "params_dtype, with_bias=False, **extra_weight_attrs)",
    expires="FusedMoE takes its weights' storage as an argument.",
)
def around_create_weights(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    """Expert weights and their scales belong to the HMM; the layer must not allocate its own."""
    import torch

    with torch.device("meta"):
        original(self, *args, **kwargs)


@hook(
    "after",
    "Fp8Config.get_supported_act_dtypes(cls)",
    scope="platform",
    expires="SGLang lets a platform say which dtypes its fp8 operators take.",
)
def after_act_dtypes(dtypes: list[Any], *_: Any) -> list[Any]:
    """The CPU's products take float32 activations, too."""
    import torch

    return [*dtypes, torch.float32]
