"""Checkpoints that have the experts of a layer in one tensor: which parts are read, counted and written, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elasticmoe_patches.worker.stacked import check_filled, fill_stacked, is_stacked, limit_columns
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.tiny_model import make_tiny_model
from elasticmoe_sglang.worker.weights import Attached

EXPERTS, INTER, HIDDEN = 4, 6, 5
UNTOUCHED = 77.0


def parameter(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, UNTOUCHED), requires_grad=False)


def test_names() -> None:
    layer = "model.layers.3.mlp.experts"
    stacked = [f"{layer}.{name}{end}" for name in ("gate_up_proj", "down_proj") for end in ("", "_bias")]
    assert all(is_stacked(name) for name in stacked)
    others = [f"{layer}.3.down_proj.weight", "model.layers.3.mlp.router.bias", "model.layers.3.self_attn.sinks"]
    assert not any(is_stacked(name) for name in others)


@pytest.mark.parametrize("columns", [{0, 2}, set(), None], ids=["some", "none", "unlimited"])
def test_columns_are_filled_gate_rows_first_and_no_others(columns: set[int] | None) -> None:
    """What the checkpoint has is [experts, inputs, 2 * inner], gate and up in turn; SGLang hands over its transpose."""
    gate, up = torch.randn(EXPERTS, INTER, HIDDEN), torch.randn(EXPERTS, INTER, HIDDEN)
    checkpoint = torch.stack([gate, up], 2).view(EXPERTS, 2 * INTER, HIDDEN).transpose(1, 2).contiguous()
    down = torch.randn(EXPERTS, HIDDEN, INTER)
    w13, w2 = parameter(EXPERTS, 2 * INTER, HIDDEN), parameter(EXPERTS, HIDDEN, INTER)
    b13, b2 = parameter(EXPERTS, 2 * INTER), parameter(EXPERTS, HIDDEN)
    for param in (w13, w2, b13, b2):
        if columns is not None:
            limit_columns(param, columns)
    fill_stacked(w13, checkpoint.transpose(-2, -1), "w13_weight", interleaved=True)
    fill_stacked(b13, torch.stack([gate[:, :, 0], up[:, :, 0]], 2).flatten(1), "w13_weight_bias", interleaved=True)
    fill_stacked(w2, down, "w2_weight", interleaved=False)
    fill_stacked(b2, down[:, :, 0], "w2_weight_bias", interleaved=False)
    for column in range(EXPERTS):
        if columns is not None and column not in columns:
            assert all(bool((param[column] == UNTOUCHED).all()) for param in (w13, w2, b13, b2))
            continue
        assert torch.equal(w13[column], torch.cat([gate[column], up[column]]))
        assert torch.equal(b13[column], torch.cat([gate[column, :, 0], up[column, :, 0]]))
        assert torch.equal(w2[column], down[column])
        assert torch.equal(b2[column], down[column, :, 0])


def test_a_tensor_of_another_shape_is_refused() -> None:
    with pytest.raises(
        UserInputError, match=r"w2_weight has shape \[4, 5, 7\], and the model \[4, 5, 6\].*config.json"
    ):
        fill_stacked(parameter(4, 5, 6), torch.zeros(4, 5, 7), "w2_weight", interleaved=False)


def test_a_tensor_that_is_missing_is_named() -> None:
    """Else a column would be served that holds zeros. A rank that reads no column misses nothing."""
    filled, left_out, unwanted = parameter(4, 5), parameter(4, 5), parameter(4, 5)
    limit_columns(filled, {1})
    limit_columns(left_out, {1})
    limit_columns(unwanted, ())
    fill_stacked(filled, torch.zeros(4, 5), "w2_weight_bias", interleaved=False)
    check_filled([("0.w2_weight_bias", filled), ("1.w2_weight_bias", unwanted)])
    with pytest.raises(UserInputError, match=r"no tensor of all experts for 3\.w2_weight_bias.*experts\.gate_up_proj"):
        check_filled([("0.w2_weight_bias", filled), ("3.w2_weight_bias", left_out)])


@pytest.mark.process  # imports SGLang
def test_every_byte_is_read_by_one_rank(tmp_path: Path) -> None:
    """Rank 0 fills the dense block too; a rank that has nothing to fill reads nothing."""
    from elasticmoe_patches.worker.loader import CheckpointReader

    file = make_tiny_model(tmp_path, arch="gpt_oss", layers=2, experts=6, hidden=64) / "model.safetensors"
    tensors = load_file(file)
    ranks = [
        Attached(load_columns=frozenset({0, 1, 2}), load_dense=True),
        Attached(load_columns=frozenset({3, 5}), load_dense=False),
        Attached(load_columns=frozenset({4}), load_dense=False),
        Attached(load_columns=frozenset(), load_dense=False),
    ]
    readers = [CheckpointReader([str(file)], found) for found in ranks]
    names = [{name for name, _ in reader} for reader in readers]
    stacked = {name for name in tensors if is_stacked(name)}
    assert len(stacked) == 8
    assert names == [set(tensors), stacked, stacked, set()]
    assert sum(reader.bytes for reader in readers) == sum(tensor.nbytes for tensor in tensors.values())
