"""Weights of `--load-format dummy`: the same for everybody, and only where they are missing."""

from __future__ import annotations

import torch

from elasticmoe_patches.worker.dummy_weights import dummy_fingerprint, fill_dummy
from elasticmoe_sglang.worker.weights import Attached


def columns() -> dict[str, torch.Tensor]:
    return {name: torch.full((4, 6, 8), float("nan")) for name in ("0.w13_weight", "0.w2_weight")}


def test_a_column_is_the_same_whoever_makes_it() -> None:
    whole, parts = columns(), columns()
    fill_dummy({}, whole, Attached(load_columns=frozenset(range(4)), load_dense=False))
    for rank in (3, 1, 0, 2):  # each rank its own, in any order
        fill_dummy({}, parts, Attached(load_columns=frozenset((rank,)), load_dense=False))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    one = whole["0.w13_weight"]
    assert len({tuple(one[column].flatten().tolist()) for column in range(4)}) == 4
    assert not torch.equal(one, whole["0.w2_weight"])
    assert 0 < float(one.abs().max()) <= 1e-3


def test_what_is_there_already_is_not_touched() -> None:
    weights, dense = columns(), {"embed": torch.nn.Parameter(torch.ones(3), requires_grad=False)}
    fill_dummy(dense, weights, Attached(load_columns=frozenset((1,)), load_dense=False))
    assert all(view[[0, 2, 3]].isnan().all() and not view[1].isnan().any() for view in weights.values())
    assert dense["embed"].tolist() == [1, 1, 1]
    fill_dummy(dense, weights, Attached(load_columns=frozenset(), load_dense=True))
    assert float(dense["embed"].abs().max()) <= 1e-3


def test_block_quantised_weights_are_filled_and_scalars_left() -> None:
    quantised = {"0.w13_weight": torch.full((2, 128, 128), float("nan")).to(torch.float8_e4m3fn)}
    quantised["0.w13_weight_scale_inv"] = torch.full((2, 1, 1), float("nan"))
    dense = {"attn.k_scale": torch.nn.Parameter(torch.tensor(-1.0), requires_grad=False)}
    fill_dummy(dense, quantised, Attached(load_columns=frozenset((1,)), load_dense=True))
    assert all(view[0].float().isnan().all() and not view[1].float().isnan().any() for view in quantised.values())
    assert float(quantised["0.w13_weight"][1].float().abs().max()) > 0
    assert float(dense["attn.k_scale"]) == -1


def test_a_fingerprint_is_one_models() -> None:
    known = {
        dummy_fingerprint(config, dtype) for config in ("{}", '{"a": 1}') for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(known) == 4
    assert dummy_fingerprint("{}", torch.float32) == dummy_fingerprint("{}", torch.float32)
