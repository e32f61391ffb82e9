"""Which of SGLang's MoE layers are computed, and with what beside their weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe_patches.worker.experts import biases_of, run_experts
from elasticmoe_sglang.errors import UnsupportedFeature


def layer(**config: Any) -> SimpleNamespace:
    fields = {"gemm1_alpha": None, "gemm1_clamp_limit": None, **config}
    return SimpleNamespace(
        moe_runner_config=SimpleNamespace(**fields), w13_weight_bias="biases of w13", w2_weight_bias="biases of w2"
    )


def test_biases_go_with_what_clamps() -> None:
    assert biases_of(layer()) == {}
    assert biases_of(layer(gemm1_alpha=1.702)) == {}
    found = biases_of(layer(gemm1_alpha=1.702, gemm1_clamp_limit=7.0))
    assert found == {"w13_bias": "biases of w13", "w2_bias": "biases of w2", "clamped": (1.702, 7.0)}


@pytest.mark.process  # imports SGLang
@pytest.mark.parametrize(
    ("config", "with_bias", "more"),
    [
        ({}, True, {}),
        ({}, False, {"clamped": (1.702, 7.0)}),
        ({"activation": "gelu"}, False, {}),
        ({"is_gated": False}, False, {}),
        ({"apply_router_weight_on_input": True}, False, {}),
    ],
    ids=["biases alone", "clamped alone", "gelu", "not gated", "weighed before"],
)
def test_other_experts_are_refused(config: dict[str, Any], with_bias: bool, more: dict[str, Any]) -> None:
    fields = {"activation": "silu", "is_gated": True, "apply_router_weight_on_input": False, **config}
    method = SimpleNamespace(moe_runner_config=SimpleNamespace(**fields), with_bias=with_bias)
    weights = torch.zeros(1, 2, 1)
    with pytest.raises(UnsupportedFeature, match="experts of SwiGLU without biases only, and gpt-oss's"):
        run_experts(method, None, weights, weights, **more)
