"""Which rows of a gathered batch a rank takes for its own: together all of them, each once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe_patches.platform import torchvision_ops
from elasticmoe_patches.worker import own_rows as own_rows_module
from elasticmoe_patches.worker.own_rows import in_own_rows, is_shared_expert, own_rows
from elasticmoe_sglang.config import ElasticConfig

pytestmark = pytest.mark.process

RANKS = 4


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the gathered batch of a rank."""
    torchvision_ops.declare_if_unloadable()
    from sglang.srt.layers import dp_attention

    def set_batch(rank: int, tokens: list[int], *, padded: bool, each: int = 1) -> int:
        config = ElasticConfig(ep_size=RANKS * each, max_ep_size=RANKS * each, attention_tp=each)
        worker = SimpleNamespace(rank=rank, shard=config.shard_of(rank), runtime=SimpleNamespace(config=config))
        monkeypatch.setattr(own_rows_module, "current_worker", lambda: worker)
        monkeypatch.setattr(dp_attention, "is_dp_max_padding", lambda: padded)
        monkeypatch.setattr(dp_attention, "get_dp_global_num_tokens", lambda: tokens)
        return max(tokens) * RANKS if padded else sum(tokens)

    return set_batch


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [[3, 1, 0, 5], [0, 0, 7, 0], [2, 2, 2, 2], [1, 0, 0, 0]])
def test_the_ranks_rows_are_all_rows_once(batch: Any, tokens: list[int], padded: bool) -> None:
    taken: list[int] = []
    for rank in range(RANKS):
        rows = batch(rank, tokens, padded=padded)
        taken += range(rows)[own_rows(rows)]
    assert taken == list(range(rows))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("each", [2, 3])
def test_the_ranks_of_a_replica_share_its_rows(batch: Any, padded: bool, each: int) -> None:
    taken: list[int] = []
    for rank in range(RANKS * each):
        rows = batch(rank, [3, 1, 0, 5], padded=padded, each=each)
        taken += range(rows)[own_rows(rows)]
    assert taken == list(range(rows))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [[3, 1, 0, 5], [4, 4, 4, 4], [0, 9, 0, 0]])
def test_the_sum_over_ranks_is_what_one_rank_would_compute(batch: Any, tokens: list[int], padded: bool) -> None:
    rows = batch(0, tokens, padded=padded)
    hidden = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))
    seen: list[int] = []

    def compute(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.shape[0])
        return part * 3 + 1

    total = torch.zeros_like(hidden)
    for rank in range(RANKS):
        batch(rank, tokens, padded=padded)
        total += in_own_rows(compute, hidden)
    assert torch.equal(total, compute(hidden))
    assert sum(seen[:-1]) == rows and 0 not in seen


def test_shared_experts_are_known_by_their_name() -> None:
    assert is_shared_expert("model.layers.3.mlp.shared_experts") and is_shared_expert("mlp.shared_expert")
    assert not is_shared_expert("model.layers.0.mlp") and not is_shared_expert("mlp.shared_expert.gate_up_proj")


def test_no_shared_expert_is_no_output(batch: Any) -> None:
    rows = batch(1, [2, 2, 0, 0], padded=False)
    assert in_own_rows(lambda part: None, torch.ones(rows, 8)) is None
