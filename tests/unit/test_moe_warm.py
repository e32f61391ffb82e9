"""The list of batches that load all of the MoE layer's kernels leaves out no number of tokens."""

from __future__ import annotations

import pytest
import torch

from elasticmoe_kernels.triton import warm

SHAPES = {
    "qwen3-30b-a3b": (8, 128, 2048, 768, torch.bfloat16),
    "deepseek-v2-lite": (6, 64, 2048, 1408, torch.bfloat16),
    "untuned": (2, 16, 512, 256, torch.bfloat16),
    "deepseek-v3": (8, 256, 7168, 2048, torch.float8_e4m3fn),
    "qwen3-30b-a3b-fp8": (8, 128, 2048, 768, torch.float8_e4m3fn),
}
"""top k, experts, H, I, and the dtype of the weights."""


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("most", [1, 5, 64, 4096, 9000])
def test_every_number_of_tokens_is_covered(shape: tuple[int, int, int, int, torch.dtype], most: int) -> None:
    top_k, experts, hidden, inter, dtype = shape
    counts = warm.token_counts(most, top_k=top_k, experts=experts, hidden=hidden, inter=inter, dtype=dtype)
    assert counts == sorted(set(counts)) and counts[0] == 1 and counts[-1] <= most
    loaded = {warm._kernels_of(tokens, top_k, experts, hidden, inter, dtype) for tokens in counts}
    missing = [
        tokens
        for tokens in range(1, most + 1)
        if warm._kernels_of(tokens, top_k, experts, hidden, inter, dtype) not in loaded
    ]
    assert not missing, f"{len(missing)} numbers of tokens: {missing[:10]}"
    assert len(counts) <= 40
