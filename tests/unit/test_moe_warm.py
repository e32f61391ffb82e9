"""The list of batches that load all of the MoE layer's kernels leaves out no number of tokens."""

from __future__ import annotations

import pytest
import torch

from elasticmoe_kernels.triton import warm

SHAPES = {"qwen3-30b-a3b": (8, 128, 2048, 768), "deepseek-v2-lite": (6, 64, 2048, 1408), "untuned": (2, 16, 512, 256)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("most", [1, 5, 64, 4096, 9000])
def test_every_number_of_tokens_is_covered(shape: tuple[int, int, int, int], most: int) -> None:
    top_k, experts, hidden, inter = shape
    counts = warm.token_counts(most, top_k=top_k, experts=experts, hidden=hidden, inter=inter, dtype=torch.bfloat16)
    assert counts == sorted(set(counts)) and counts[0] == 1 and counts[-1] <= most
    loaded = {warm._kernels_of(tokens, top_k, experts, hidden, inter, torch.bfloat16) for tokens in counts}
    missing = [
        tokens
        for tokens in range(1, most + 1)
        if warm._kernels_of(tokens, top_k, experts, hidden, inter, torch.bfloat16) not in loaded
    ]
    assert not missing, f"{len(missing)} numbers of tokens: {missing[:10]}"
    assert len(counts) <= 40
