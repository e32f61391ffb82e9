"""Random numbers of sampled requests: they depend on seed and position alone, and the choice follows the weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe_patches.sampling import choose, draw_seed, keep_likely, own_generator, uniform

SAMPLES = 40_000


def rows(weights: list[float], count: int) -> torch.Tensor:
    return torch.tensor([weights]).log().expand(count, -1)


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_columns_are_chosen_in_proportion_to_their_weight(vary: str) -> None:
    weights = [0.0, 3.0, 0.0, 1.0, 4.0, 0.0]
    running, fixed = torch.arange(SAMPLES), torch.full((SAMPLES,), 7)
    seeds, positions = (running, fixed) if vary == "seed" else (fixed, running)
    chosen = choose(rows(weights, SAMPLES), seeds, positions).view(-1)
    counts = torch.bincount(chosen, minlength=len(weights)).tolist()
    for weight, count in zip(weights, counts, strict=True):
        expected = weight / sum(weights)
        spread = (SAMPLES * expected * (1 - expected)) ** 0.5
        assert abs(count - SAMPLES * expected) <= 5 * spread, counts


def test_numbers_of_neighbouring_seeds_and_positions_are_not_correlated() -> None:
    seeds, positions = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    numbers = uniform(seeds.reshape(-1), positions.reshape(-1)).view(200, 200)
    assert numbers.min() > 0 and numbers.max() < 1 and numbers.unique().numel() == numbers.numel()
    for one, other in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        pair = torch.stack([one.reshape(-1), other.reshape(-1)])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 5 / pair.shape[1] ** 0.5


def test_a_row_is_chosen_alike_whatever_else_is_in_the_batch() -> None:
    torch.manual_seed(1)
    logits = torch.randn(8, 100).log_softmax(-1)
    seeds, positions = torch.randint(2**62, (8,)), torch.randint(4000, (8,))
    together = choose(logits, seeds, positions)
    alone = [choose(logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1]) for i in range(8)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, choose(logits, seeds + 1, positions))


def test_a_row_is_chosen_alike_whether_its_columns_are_sorted_or_not() -> None:
    """They are, if another request of the batch samples with top-k."""
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    seeds, positions = torch.arange(64), torch.arange(64) * 3
    ordered, columns = logits.sort(dim=-1, descending=True)
    assert torch.equal(choose(logits, seeds, positions), columns.gather(-1, choose(ordered, seeds, positions)))


def test_min_p_leaves_out_what_is_unlikely() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04]])
    assert torch.equal(keep_likely(probs, torch.tensor([0.5, 0.05])), torch.tensor([[0.5, 0.3, 0.0], [0.9, 0.06, 0.0]]))


class Sampling(SimpleNamespace):
    """Of SGLang's sampling parameters: `top_k` is 1 after temperature 0."""


def tokenized(sampling: Any) -> Any:
    return SimpleNamespace(sampling_params=sampling)


def test_a_request_that_samples_gets_a_seed_of_its_own_and_keeps_the_one_it_has() -> None:
    shared = Sampling(top_k=1 << 30, sampling_seed=None)
    answers = [tokenized(shared) for _ in range(3)]
    for answer in answers:
        draw_seed(answer)
    assert len({answer.sampling_params.sampling_seed for answer in answers}) == 3
    assert shared.sampling_seed is None
    given, greedy = Sampling(top_k=5, sampling_seed=11), Sampling(top_k=1, sampling_seed=None)
    for sampling in (given, greedy):
        request = tokenized(sampling)
        draw_seed(request)
        assert request.sampling_params is sampling


def test_no_two_workers_have_the_same_generator() -> None:
    def numbers(rank: int, epoch: int) -> tuple[float, ...]:
        own_generator(42, rank, epoch)
        return tuple(torch.rand(4).tolist())

    found = {numbers(rank, epoch) for rank in range(4) for epoch in range(4)}
    assert len(found) == 16 and numbers(1, 2) in found
