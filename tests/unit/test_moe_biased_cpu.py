"""Experts with biases and a clamped SwiGLU on CPU against their float64 definition, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe_kernels import NoBackend, ShapeError, moe_experts
from elasticmoe_kernels.cpu import moe as cpu_moe
from elasticmoe_kernels.reference.moe import moe_experts_biased
from elasticmoe_kernels.registry import select

# Relative error (2-norm of the difference over that of the result) that each dtype allows.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
ALPHA, LIMIT = 1.702, 1.0
"""The limit is one that a third of all values reach."""


def layer(
    tokens: int, slots: int, k: int, hidden: int, inter: int, dtype: torch.dtype, *, absent: float = 0.0, seed: int = 0
) -> dict[str, Any]:
    """Weights and biases of a slot in one allocation, NaN between them and in slots that no pair names."""
    generator = torch.Generator().manual_seed(seed)
    weights, biases = 3 * inter * hidden, 2 * inter + hidden
    columns = torch.full((slots, weights + 7), float("nan"), dtype=dtype)
    flat = torch.full((slots, biases + 5), float("nan"))
    w13 = columns.as_strided((slots, 2 * inter, hidden), (weights + 7, hidden, 1))
    w2 = columns.as_strided((slots, hidden, inter), (weights + 7, inter, 1), 2 * inter * hidden)
    b13, b2 = flat[:, : 2 * inter], flat[:, 2 * inter : biases]
    topk_slots = torch.rand(tokens, slots, generator=generator).topk(k).indices
    topk_slots[torch.rand(tokens, k, generator=generator) < absent] = -1
    for slot in set(topk_slots.flatten().tolist()) - {-1}:
        w13[slot] = (torch.randn(w13.shape[1:], generator=generator) / hidden**0.5).to(dtype)
        w2[slot] = (torch.randn(w2.shape[1:], generator=generator) / inter**0.5).to(dtype)
        b13[slot] = torch.randn(2 * inter, generator=generator)
        b2[slot] = torch.randn(hidden, generator=generator)
    topk_weights = torch.rand(tokens, k, generator=generator)
    topk_weights[topk_slots < 0] = float("nan")
    return {
        "x": torch.randn(tokens, hidden, generator=generator).to(dtype),
        "w13": w13,
        "w2": w2,
        "topk_slots": topk_slots,
        "topk_weights": topk_weights,
        "w13_bias": b13,
        "w2_bias": b2,
        "clamped": (ALPHA, LIMIT),
    }


def reference(given: dict[str, Any]) -> torch.Tensor:
    plain = {name: value for name, value in given.items() if name != "clamped"}
    return moe_experts_biased(**plain, alpha=ALPHA, limit=LIMIT)


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    scale = ref.norm()
    return 0.0 if scale == 0 and not out.any() else float((out.to(ref.dtype) - ref).norm() / scale)


@settings(max_examples=100, deadline=None)
@given(
    tokens=st.sampled_from([0, 1, 2, 16, 33, 70]),
    slots=st.integers(1, 7),
    k=st.integers(1, 4),
    shape=st.sampled_from([(8, 8), (40, 24), (33, 17), (272, 136)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_float64_definition(
    tokens: int, slots: int, k: int, shape: tuple[int, int], dtype: torch.dtype, absent: float, seed: int
) -> None:
    made = layer(tokens, slots, min(k, slots), *shape, dtype, absent=absent, seed=seed)
    out = moe_experts(**made)
    assert out.dtype == dtype and relative_error(out, reference(made)) <= TOLERANCE[dtype]


def test_the_definition_by_hand() -> None:
    """One value a projection: gate 2 * 3 + 1 is cut to 5, up 2 * -4 - 3 to -5; then down and its bias, once a pair."""
    one = torch.ones(1, 1, 1)
    out = moe_experts(
        torch.tensor([[2.0]]),
        torch.tensor([[[3.0], [-4.0]]]),
        2 * one,
        torch.tensor([[0, 0]]),
        torch.tensor([[0.5, 0.25]]),
        w13_bias=torch.tensor([[1.0, -3.0]]),
        w2_bias=torch.tensor([[10.0]]),
        clamped=(ALPHA, 5.0),
    )
    expert = 2 * (5 / (1 + torch.tensor(-ALPHA * 5).exp()) * (-5 + 1)) + 10
    torch.testing.assert_close(out, (0.75 * expert).view(1, 1))


def test_experts_split_among_ranks_add_up() -> None:
    """A bias is added by the rank that has the expert, and by no other."""
    made = layer(33, 6, 4, 40, 24, torch.float32)
    whole = moe_experts(**made)
    slots = made["topk_slots"]
    parts = [moe_experts(**made | {"topk_slots": torch.where(slots % 3 == rank, slots, -1)}) for rank in range(3)]
    assert relative_error(sum(parts), whole.double()) <= 4e-6  # type: ignore[arg-type]


def test_a_long_prefill_is_cut_into_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer(101, 6, 2, 40, 24, torch.float32)
    whole = moe_experts(**made)
    monkeypatch.setattr(cpu_moe, "MAX_ROWS_PER_PASS", 32)
    assert relative_error(moe_experts(**made), whole.double()) <= 2e-6


def test_the_reference_is_a_backend_of_its_own() -> None:
    made = layer(5, 4, 2, 40, 24, torch.float32)
    assert torch.equal(moe_experts(**made, backend="reference"), reference(made).float())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"w2_bias": None}, "w13_bias, w2_bias and clamped go together"),
        ({"clamped": None}, "w13_bias, w2_bias and clamped go together"),
        ({"w13_bias": None, "w2_bias": None}, "w13_bias, w2_bias and clamped go together"),
        ({"w13_bias": torch.zeros(4, 24)}, r"w13_bias must be float32 \[4, 48\]"),
        ({"w2_bias": torch.zeros(4, 40, dtype=torch.bfloat16)}, r"w2_bias must be float32 \[4, 40\].*bfloat16"),
        ({"w2_bias": torch.zeros(40, 4).t()}, "w2_bias must be float32.*contiguous rows"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ShapeError, match=sentence):
        moe_experts(**layer(3, 4, 2, 40, 24, torch.float32) | changes)


def test_quantised_weights_have_no_biases() -> None:
    made = layer(3, 4, 2, 128, 128, torch.float32)
    for name, rows, columns in (("w13", 2, 1), ("w2", 1, 1)):
        made[name] = torch.zeros(made[name].shape).to(torch.float8_e4m3fn)
        made[f"{name}_scale"] = torch.ones(4, rows, columns)
    with pytest.raises(ShapeError, match="biases do not go with e4m3 weights"):
        moe_experts(**made)


def test_a_backend_without_biases_says_so() -> None:
    npu: Any = SimpleNamespace(type="npu")  # torch knows the name once torch_npu is loaded
    with pytest.raises(NoBackend, match=r"'ascend' does not serve torch.bfloat16 with biased experts on npu"):
        select(npu, torch.bfloat16, "ascend", biased=True)
    assert select(torch.device("cuda"), torch.bfloat16, biased=True).name == "triton"
