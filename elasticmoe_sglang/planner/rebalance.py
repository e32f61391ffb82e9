"""Moving expert columns so that active ranks get equal shares of the routed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elasticmoe_sglang.errors import PlanError
from elasticmoe_sglang.planner.placement import Placement

_LEAST_GAIN = 0.01
"""A swap has to lower the fullest rank's load by this share of the mean."""


@dataclass(frozen=True, kw_only=True)
class Rebalance:
    """Target: the same ranks, with columns placed by load.

    Attributes:
        load: tokens routed to each expert column while somebody looked; only their ratios matter.
    """

    load: tuple[float, ...]


def rank_loads(placement: Placement, ranks: Sequence[int], load: Sequence[float]) -> dict[int, float]:
    """Load of each of `ranks`: the sum over its columns."""
    found = dict.fromkeys(ranks, 0.0)
    for owner, amount in zip(placement.owners, load, strict=True):
        found[owner] += amount
    return found


def imbalance(placement: Placement, ranks: Sequence[int], load: Sequence[float]) -> float:
    """The fullest rank's load over the mean: 1.0 is perfect, the number of ranks the worst. 1.0 without any load.

    A layer's experts are done when the fullest rank is, so this is how much longer they take than they had to.
    """
    loads = rank_loads(placement, ranks, load)
    mean = sum(loads.values()) / len(loads)
    return max(loads.values()) / mean if mean > 0 else 1.0


def balanced(placement: Placement, ranks: Sequence[int], load: Sequence[float]) -> Placement:
    """A placement over the same ranks, each with as many columns as before, in which no swap of two columns helps.

    Columns are swapped between the fullest rank and another one, each time the pair that lowers the larger of their
    two loads most, so that few columns move. Every rank keeps its number of columns: so do its memory and its KV.

    Args:
        load: of each column, not negative.

    Raises:
        PlanError: the number of loads is not that of the columns, or one is negative.
    """
    if len(load) != placement.num_columns or any(amount < 0 for amount in load):
        raise PlanError(
            f"{len(load)} loads do not describe {placement.num_columns} expert columns",
            hint="Give one number that is not negative for each column",
        )
    owners = list(placement.owners)
    held = {rank: list(placement.columns_of(rank)) for rank in ranks}
    loads = rank_loads(placement, ranks, load)
    least = _LEAST_GAIN * sum(loads.values()) / len(loads)
    # Each swap lowers the fullest rank's load, or the number of ranks that have it; the bound is for rounding's sake.
    for _ in range(placement.num_columns * len(loads)):
        fullest = max(ranks, key=lambda rank: (loads[rank], -rank))
        swap = _best_swap(fullest, held, loads, load)
        if swap is None or swap[0] <= least:
            break
        _, given, taken, other = swap
        difference = load[given] - load[taken]
        loads[fullest] -= difference
        loads[other] += difference
        held[fullest].remove(given)
        held[other].remove(taken)
        held[fullest].append(taken)
        held[other].append(given)
        owners[given], owners[taken] = other, fullest
    return Placement(owners=tuple(owners))


def _best_swap(
    fullest: int, held: dict[int, list[int]], loads: dict[int, float], load: Sequence[float]
) -> tuple[float, int, int, int] | None:
    """(gain, column given, column taken, other rank); gain: by how much the larger load falls. None: no swap helps."""
    best: tuple[float, int, int, int] | None = None
    for other in held:
        gap = loads[fullest] - loads[other]
        if other == fullest or gap <= 0:
            continue
        for given in held[fullest]:
            for taken in held[other]:
                difference = load[given] - load[taken]
                gain = min(difference, gap - difference)
                if gain > 0 and (best is None or gain > best[0]):
                    best = (gain, given, taken, other)
    return best
