"""The absorbed projections of latent attention, from block-quantised fp8 on the CPU platform."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks
from elasticmoe_sglang.models.quantization import check_blocks

HOOKS = hook = Hooks(__name__, WORKERS, scope="platform")


@hook(
    "replace",
    "block_quant_to_tensor_quant(x_q_block, x_s, block_size)",
    expires="SGLang dequantises kv_b_proj on out-of-tree platforms as it does on CUDA.",
)
def dequantize(x_q_block: Any, x_s: Any, block_size: Any) -> tuple[Any, None]:
    """Where there is no `bmm_fp8` the projections are dequantised, as on CUDA; SGLang's own makes e4m3 with one scale
    of them, of which the CPU platform has no product.

    e4m3 [N, K], its scales and [128, 128] -> ([N, K] in the dtype of the model that is being loaded, no scale). Raises
    UnsupportedFeature for other blocks.
    """
    import torch

    from elasticmoe_kernels.cpu.fp8 import dequantize

    check_blocks(block_size)
    wide = torch.empty(x_q_block.shape, dtype=torch.float32, device=x_q_block.device)
    return dequantize(x_q_block, x_s, wide).to(torch.get_default_dtype()), None
