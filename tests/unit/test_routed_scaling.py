"""Who multiplies by a model's routed scaling factor: SGLang's models leave it to the MoE layer on GPUs only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe_patches.srt.layers.quantization import unquant

pytestmark = pytest.mark.process


@pytest.mark.parametrize(
    ("on_gpu", "factor", "expected"), [(True, 2.5, 2.5), (True, None, 1.0), (True, 1.0, 1.0), (False, 2.5, 1.0)]
)
def test_weights_carry_the_factor_on_gpus_only(
    monkeypatch: pytest.MonkeyPatch, on_gpu: bool, factor: float | None, expected: float
) -> None:
    seen: list[torch.Tensor] = []

    def moe_experts(hidden: Any, _w13: Any, _w2: Any, _ids: Any, weights: torch.Tensor) -> Any:
        seen.append(weights)
        return hidden

    monkeypatch.setattr("elasticmoe_kernels.moe_experts", moe_experts)
    config = SimpleNamespace(
        activation="silu",
        is_gated=True,
        apply_router_weight_on_input=False,
        routed_scaling_factor=factor,
        gemm1_alpha=None,
    )
    dispatched = SimpleNamespace(
        hidden_states=SimpleNamespace(is_cuda=on_gpu), topk_output=(torch.full((2, 3), 0.25), None, None)
    )
    layer = SimpleNamespace(w13_weight=None, w2_weight=None, moe_runner_config=config)
    unquant.forward(SimpleNamespace(moe_runner_config=config, with_bias=False), layer, dispatched)
    assert torch.equal(seen[0], torch.full((2, 3), 0.25 * expected))
