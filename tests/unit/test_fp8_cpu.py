"""Products with e4m3 weights in blocks of 128 x 128 on CPU, against their float64 definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from elasticmoe_kernels import NoBackend, ShapeError, moe_experts
from elasticmoe_kernels.cpu import fp8
from elasticmoe_kernels.cpu import moe as cpu_moe
from elasticmoe_kernels.reference.moe import moe_experts_fp8
from elasticmoe_kernels.reference.quantize import dequantize_weight, quantize_weight

# Relative error (2-norm): float32 sums of some hundred terms; otherwise the one rounding of the result.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
SHAPES = [(128, 128), (256, 384), (200, 130), (64, 96), (129, 64), (320, 256)]
"""Of matrices: whole blocks, and what kv_a_proj, kv_b_proj and biases of tiny widths leave of them."""


def weight(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(1, rows, columns, generator=generator) / columns**0.5
    q, scale = quantize_weight(drawn)
    return q[0], scale[0]


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    return float((out.to(ref.dtype) - ref).norm() / ref.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_is_the_definition_rounded_once(shape: tuple[int, int]) -> None:
    q, scale = weight(*shape)
    exact = dequantize_weight(q, scale)
    assert torch.equal(fp8.dequantize(q, scale, torch.empty(shape, dtype=torch.float64)), exact)
    assert torch.equal(fp8.dequantize(q, scale, torch.empty(shape)), exact.float())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("band", [1, fp8.BAND_ELEMENTS])
def test_a_linear_layer(shape: tuple[int, int], dtype: torch.dtype, band: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where every row of blocks is a band of its own."""
    monkeypatch.setattr(fp8, "BAND_ELEMENTS", band)
    q, scale = weight(*shape)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, shape[1], generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype)
    expected = x.double() @ dequantize_weight(q, scale).T
    for added, reference in ((None, expected), (bias, expected + bias.double())):
        out = fp8.linear(x, q, scale, added)
        assert out.dtype == dtype and relative_error(out, reference) <= TOLERANCE[dtype]
    assert fp8.linear(x[:, :0], q, scale).shape == (2, 0, shape[0])


def layer(tokens: int, dtype: torch.dtype = torch.float32, *, hidden: int = 256, inter: int = 128) -> dict[str, Any]:
    """Five slots, each with weights and scales in one allocation; slot 3 is named by no pair and holds NaN."""
    generator = torch.Generator().manual_seed(tokens)
    slots, top_k = 5, 3
    shapes = {"w13": (2 * inter, hidden), "w2": (hidden, inter)}
    made = {name: quantize_weight(torch.randn(slots, *shapes[name], generator=generator) / 16) for name in shapes}
    pitch = 3 * inter * hidden + 64 + 128
    column = torch.full((slots, pitch), 0x7F, dtype=torch.uint8)
    arguments: dict[str, Any] = {}
    start = 0
    for name, (q, scale) in made.items():
        for key, tensor in ((name, q), (f"{name}_scale", scale)):
            bytes_ = tensor[0].numel() * tensor.itemsize
            view = column[:, start : start + bytes_].view(tensor.dtype)
            view = view.as_strided(
                tensor.shape, (pitch // tensor.itemsize, *tensor.stride()[1:]), view.storage_offset()
            )
            view.copy_(tensor)
            view[3] = float("nan")
            arguments[key] = view
            start += -(-bytes_ // 64) * 64
    named = torch.tensor([0, 1, 2, 4])
    ids = named[torch.rand(tokens, len(named), generator=generator).topk(top_k).indices].int()
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    return {"x": x, "topk_slots": ids, "topk_weights": torch.rand(tokens, top_k, generator=generator), **arguments}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [0, 1, 4, 70])
def test_the_layer_equals_the_definition_with_activations_as_they_are(tokens: int, dtype: torch.dtype) -> None:
    made = layer(tokens, dtype)
    out = moe_experts(**made)
    assert out.dtype == dtype and out.shape == made["x"].shape
    if tokens:
        assert relative_error(out, moe_experts_fp8(**made, quantize_activations=False)) <= TOLERANCE[dtype]


def test_a_long_prefill_and_wide_experts_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(101)
    monkeypatch.setattr(cpu_moe, "MAX_ROWS_PER_PASS", 32)
    monkeypatch.setattr(fp8, "BAND_ELEMENTS", 1)
    assert relative_error(moe_experts(**made), moe_experts_fp8(**made, quantize_activations=False)) <= 2e-6


def test_experts_split_among_ranks_add_up() -> None:
    made = layer(40, torch.float64)
    slots = made["topk_slots"]
    parts = [moe_experts(**made | {"topk_slots": torch.where(slots % 2 == rank, slots, -1)}) for rank in (0, 1)]
    assert relative_error(parts[0] + parts[1], moe_experts(**made)) <= 1e-12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w2_scale": None}, "scales go with torch.float8_e4m3fn weights, both"),
        ({"w13": torch.zeros(5, 256, 256)}, "the weights are torch.float32"),
        ({"w13_scale": torch.ones(5, 2, 1)}, r"w13_scale must be float32 \[5, 2, 2\]"),
        ({"w2_scale": torch.ones(5, 2, 1, dtype=torch.float64)}, "w2_scale must be float32 .*float64"),
        ({"w13_scale": torch.ones(5, 2, 2).transpose(1, 2)}, "w13_scale must be .*strides"),
    ],
)
def test_scales_that_do_not_fit_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        moe_experts(**layer(3) | changes)


def test_experts_of_no_whole_blocks_are_refused() -> None:
    made = layer(3)
    narrow = {"w13": made["w13"][:, :192], "w2": made["w2"][..., :96].contiguous()}
    with pytest.raises(ShapeError, match=r"multiples of 128; got 256 and 96"):
        moe_experts(**made | narrow)


def test_a_backend_without_fp8_says_so() -> None:
    with pytest.raises(NoBackend, match=r"'reference' does not serve torch\.float32 with e4m3 weights on cpu"):
        moe_experts(**layer(3), backend="reference")
