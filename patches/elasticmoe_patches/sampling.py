"""Random numbers that depend on a request alone, so that its sampling goes on anywhere as it would have here.

SGLang draws from the default generator of its process, which all requests of a batch share, or where a seed is given
hashes it in a kernel that needs a GPU. Here each sampled request has a seed, given or drawn when it arrives, and a
token's random number is a hash of the seed and its position. Nothing else is a state, so nothing has to be moved.
"""

from __future__ import annotations

import copy
import secrets
from typing import Any

import torch

_SEED_BITS = 62


def draw_seed(tokenized: Any) -> None:
    """Give a tokenised request that samples a seed of its own if it has none.

    SGLang shares one object of sampling parameters between the answers of a request with n > 1: it is not changed.
    """
    sampling = tokenized.sampling_params
    if sampling.top_k > 1 and sampling.sampling_seed is None:
        sampling = copy.copy(sampling)
        sampling.sampling_seed = secrets.randbits(_SEED_BITS)
        tokenized.sampling_params = sampling


def own_generator(seed: int, rank: int, epoch: int) -> None:
    """Seed torch's default generators with a number of this worker's own.

    SGLang seeds all ranks alike. A request that goes on in another rank would meet random numbers again that it has
    used, and its tokens would be no sample any more.
    """
    mixed = _mix(torch.tensor([seed * 4096 + rank]), torch.tensor([epoch]))
    torch.manual_seed(int(mixed.item()))


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number of each row, in (0, 1).

    Args:
        seeds: [n] int64. positions: [n] of the sampled token's predecessor, any integer dtype.

    Returns:
        [n] float64.
    """
    return (_shift(_mix(seeds, positions), 11).double() + 0.5) * 2.0**-53


def choose(log_weights: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One column of each row, with a probability proportional to its weight, whatever the order of the columns.

    SGLang sorts them only if some request of the batch samples with top-k, top-p or min-p.

    Args:
        log_weights: [n, m], -inf for what must not be chosen.

    Returns:
        [n, 1] int64.
    """
    weights, columns = log_weights.double().exp().sort(dim=-1, descending=True, stable=True)
    edges = weights.cumsum(-1)
    total = edges[:, -1:]
    aim = torch.minimum(uniform(seeds, positions)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return columns.gather(-1, torch.searchsorted(edges, aim, right=True))


def keep_likely(probs: torch.Tensor, min_ps: torch.Tensor) -> torch.Tensor:
    """Probabilities [n, m] without those below `min_ps` [n] of their row's largest: 0 in their place."""
    return probs.masked_fill(probs < probs.max(dim=-1, keepdim=True).values * min_ps.view(-1, 1), 0.0)


def _mix(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """splitmix64 of a seed's stream at a position; int64 arithmetic wraps as uint64 does."""
    z = seeds + (positions.to(torch.int64) + 1) * _signed(0x9E3779B97F4A7C15)
    # Twice: seeds that differ by a multiple of the constant would have the same stream, shifted.
    for _ in range(2):
        z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
        z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
        z = (z ^ _shift(z, 31)) + seeds
    return z


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
