"""Linear layers with block-quantised fp8 weights on the CPU platform."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_sglang.models.quantization import check_blocks

HOOKS = hook = Hooks(__name__, WORKERS, scope="platform")

_LINEAR = (
    "(input, weight, block_size, weight_scale, input_scale=None, bias=None, act_scale_ue8m0=False"  # 0.5.23 has more
)


@hook(
    "replace",
    f"triton_w8a8_block_fp8_linear{_LINEAR})",
    also={"0.5.23": f"{_LINEAR}, weight_bf16=None)"},
    expires="SGLang's dispatch of block-quantised products asks the platform.",
)
def linear(
    input: Any,  # SGLang calls it by these names
    weight: Any,
    block_size: Any,
    weight_scale: Any,
    input_scale: Any = None,
    bias: Any = None,
    act_scale_ue8m0: bool = False,
    weight_bf16: Any = None,
) -> Any:
    """SGLang's own is a Triton kernel, the fallback of its dispatch. Weights are dequantised, activations are not
    quantised, as in SGLang's operators for CPUs with AMX.

    [..., K] -> [..., N] in the input's dtype. `input_scale` would come from a fused kernel for GPUs. Raises
    UnsupportedFeature for other blocks than 128 x 128.
    """
    from elasticmoe_kernels.cpu.fp8 import linear

    assert input_scale is None
    check_blocks(block_size)
    return linear(input, weight, weight_scale, bias)
