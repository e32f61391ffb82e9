"""SGLang's block-quantised linear layers with the hooks of the CPU platform, and the list that loads their kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe_kernels.reference.quantize import dequantize_weight, quantize_weight
from elasticmoe_patches.srt.layers.quantization import fp8_utils
from elasticmoe_patches.srt.models.deepseek_common import deepseek_weight_loader
from elasticmoe_patches.worker.linear_kernels import load_linear_kernels
from elasticmoe_sglang.errors import UnsupportedFeature
from elasticmoe_sglang.models.quantization import BLOCK_FP8

pytestmark = pytest.mark.process


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """[160, 256], as kv_a_proj of a tiny model has it."""
    from sglang.srt.layers.linear import ReplicatedLinear
    from sglang.srt.layers.quantization import fp8
    from sglang.srt.layers.quantization import fp8_utils as upstream

    # SGLang asks how many ranks shard a layer; nobody has told it in this process.
    monkeypatch.setattr(fp8, "get_parallel", lambda: SimpleNamespace(tp_size=1))
    monkeypatch.setattr(upstream, "triton_w8a8_block_fp8_linear", fp8_utils.linear)
    monkeypatch.setattr(upstream, "FP8_GEMM_RUNNER_BACKEND", upstream.Fp8GemmRunnerBackend("triton"))
    made = ReplicatedLinear(256, 160, bias=False, quant_config=fp8.Fp8Config.from_config(dict(BLOCK_FP8)))
    q, scale = quantize_weight(torch.randn(1, 160, 256, generator=torch.Generator().manual_seed(0)) / 16)
    made.weight.data.copy_(q[0])
    made.weight_scale_inv.data.copy_(scale[0])
    made.quant_method.process_weights_after_loading(made)
    return made


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_sglangs_linear_layer_on_the_cpu_platform(layer: Any, dtype: torch.dtype, bound: float) -> None:
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, _ = layer(x)
    expected = x.double() @ dequantize_weight(layer.weight, layer.weight_scale_inv).T
    assert out.dtype == dtype and float((out.double() - expected).norm() / expected.norm()) <= bound


def test_absorbed_projections_are_dequantised_to_the_models_dtype(layer: Any) -> None:
    default = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_default_dtype(dtype)
            wide, scale = deepseek_weight_loader.dequantize(layer.weight.data, layer.weight_scale_inv.data, [128, 128])
            expected = dequantize_weight(layer.weight.data, layer.weight_scale_inv.data).float().to(dtype)
            assert scale is None and torch.equal(wide, expected)
    finally:
        torch.set_default_dtype(default)


def test_other_blocks_are_refused(layer: Any) -> None:
    with pytest.raises(UnsupportedFeature, match="in blocks of 64 x 128"):
        fp8_utils.linear(torch.ones(1, 256), layer.weight, [64, 128], layer.weight_scale_inv)
    with pytest.raises(UnsupportedFeature, match="in blocks of 64 x 128"):
        deepseek_weight_loader.dequantize(layer.weight, layer.weight_scale_inv, [64, 128])


def test_one_layer_of_each_shape_is_run_for_every_kind_of_batch(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.kernels.ops.gemm import fp8_kernel

    monkeypatch.setattr(fp8_kernel, "get_w8a8_block_fp8_configs", lambda *shape: {1: {}, 64: {}})
    ran: list[int] = []
    original = layer.quant_method.w8a8_block_fp8_linear

    def seen(input: torch.Tensor, **more: Any) -> Any:
        ran.append(input.shape[0])
        return original(input=input, **more)

    monkeypatch.setattr(layer.quant_method, "w8a8_block_fp8_linear", seen)
    load_linear_kernels(torch.nn.Sequential(layer, torch.nn.Linear(2, 2), layer), torch.float32, 1000)
    assert ran == [1, 2, 16, 33, 48]
