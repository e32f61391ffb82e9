"""Loading every kernel of SGLang's block-quantised linear layers on a GPU, before the first batch needs it."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

logger = logging.getLogger(__name__)

_SMALLEST = 64


def linear_token_counts(tuned: Iterable[int], most: int) -> list[int]:
    """Numbers of tokens, ascending up to `most`, of which each takes another variant of SGLang's Triton kernel than
    those before.

    Args:
        tuned: numbers of tokens for which a configuration was tuned; a batch takes the nearest's. None: one for all.
    """
    numbers = list(tuned)
    variants: dict[tuple[int, int], int] = {}
    for tokens in range(1, min(most, max(numbers, default=_SMALLEST) + 32) + 1):
        nearest = min(numbers, key=lambda number: abs(number - tokens), default=0)
        # Triton compiles for a number of 1, for multiples of 16, and for all others.
        variants.setdefault((nearest, 1 if tokens == 1 else 16 if tokens % 16 == 0 else 0), tokens)
    return sorted(variants.values())


def load_linear_kernels(model: torch.nn.Module, dtype: torch.dtype, most: int) -> None:
    """Run one layer of each shape for every kind of batch up to `most` tokens; nothing for a model without such layers.

    Args:
        dtype: of the activations.
    """
    from sglang.kernels.ops.gemm.fp8_kernel import get_w8a8_block_fp8_configs
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

    layers = [each for each in model.modules() if isinstance(each, LinearBase)]
    quantised = [each for each in layers if isinstance(each.quant_method, Fp8LinearMethod)]
    for (rows, columns), layer in {tuple(each.weight.shape): each for each in quantised}.items():
        method = layer.quant_method
        counts = linear_token_counts(get_w8a8_block_fp8_configs(rows, columns, *method.weight_block_size) or (), most)
        for tokens in counts:
            method.apply(layer, torch.zeros(tokens, columns, dtype=dtype, device=layer.weight.device))
        logger.info("fp8 kernels of [%d, %d] loaded for batches of %s tokens", rows, columns, counts)
