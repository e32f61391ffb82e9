"""Biased experts with a clamped SwiGLU on a GPU against their float64 definition, in gpt-oss's shape."""

from __future__ import annotations

import pytest
import torch

from elasticmoe_kernels import moe_experts
from elasticmoe_kernels.reference.moe import moe_experts_biased

pytestmark = pytest.mark.gpu

WIDTH, SLOTS, TOP_K = 2880, 8, 4
ALPHA, LIMIT = 1.702, 1.0
"""The limit is one that a third of all values reach."""


@pytest.mark.parametrize("tokens", [1, 16, 100, 1500])
def test_equals_the_float64_definition(tokens: int) -> None:
    """Weights and biases of a slot in one allocation, with NaN in every slot that is elsewhere."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    torch.manual_seed(tokens)
    columns = torch.full((SLOTS, 3 * WIDTH * WIDTH), float("nan"), dtype=torch.bfloat16, device="cuda")
    biases = torch.full((SLOTS, 3 * WIDTH), float("nan"), device="cuda")
    w13 = columns[:, : 2 * WIDTH * WIDTH].view(SLOTS, 2 * WIDTH, WIDTH)
    w2 = columns[:, 2 * WIDTH * WIDTH :].view(SLOTS, WIDTH, WIDTH)
    for slot in range(0, SLOTS, 2):
        columns[slot].normal_(std=WIDTH**-0.5)
        biases[slot].normal_()
    x = torch.randn(tokens, WIDTH, dtype=torch.bfloat16, device="cuda")
    slots = torch.rand(tokens, SLOTS, device="cuda").topk(TOP_K).indices
    slots = torch.where(slots % 2 == 0, slots, -1).contiguous()
    weights = torch.rand(tokens, TOP_K, device="cuda")
    b13, b2 = biases[:, : 2 * WIDTH], biases[:, 2 * WIDTH :]
    out = moe_experts(x, w13, w2, slots, weights, w13_bias=b13, w2_bias=b2, clamped=(ALPHA, LIMIT))
    wanted = moe_experts_biased(x, w13, w2, b13, b2, slots, weights, alpha=ALPHA, limit=LIMIT)
    assert float((out - wanted).norm() / wanted.norm()) <= 6e-3
