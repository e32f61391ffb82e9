"""Moving and copying expert columns so that active ranks get equal shares of the routed tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from elasticmoe_sglang.errors import PlanError
from elasticmoe_sglang.planner.placement import Placement

_LEAST_GAIN = 0.01
"""A swap has to lower the fullest rank's load by this share of the mean, and so has what copies are made for."""


@dataclass(frozen=True, kw_only=True)
class Rebalance:
    """Target: the same ranks, with columns placed by load.

    Attributes:
        load: tokens routed to each expert column while somebody looked; only their ratios matter.
        redundant: the most copies of columns there may be, over all ranks.
    """

    load: tuple[float, ...]
    redundant: int = 0


def rank_loads(placement: Placement, ranks: Sequence[int], load: Sequence[float]) -> dict[int, float]:
    """Load of each of `ranks`: the sum over its columns; a column's holders have equal shares of its load."""
    found = dict.fromkeys(ranks, 0.0)
    for column, amount in enumerate(load):
        holders = placement.holders(column)
        for rank in holders:
            found[rank] += amount / len(holders)
    return found


def imbalance(placement: Placement, ranks: Sequence[int], load: Sequence[float]) -> float:
    """The fullest rank's load over the mean: 1.0 is perfect, the number of ranks the worst. 1.0 without any load.

    A layer's experts are done when the fullest rank is, so this is how much longer they take than they had to.
    """
    loads = rank_loads(placement, ranks, load)
    mean = sum(loads.values()) / len(loads)
    return max(loads.values()) / mean if mean > 0 else 1.0


def balanced(placement: Placement, ranks: Sequence[int], load: Sequence[float], *, redundant: int = 0) -> Placement:
    """A placement over the same ranks, each owning as many columns as before, in which no swap of two columns helps.

    Columns are swapped between the fullest rank and another one, each time the pair that lowers the larger of their
    two loads most, so that few columns move. Every rank keeps its number of columns: so do its memory and its KV.

    Then the column with the most load for each of its holders gets a copy, on the emptiest rank with room, and columns
    are swapped again, until there are `redundant` copies and none would be of more use elsewhere. Of all these
    placements the first that is as good as the best counts, so the one with the fewest changes. No rank has more copies
    than an equal share. Copies that are there stay where they are until another column needs them more.

    Args:
        load: of each column, not negative.
        redundant: the most copies, over all ranks.

    Raises:
        PlanError: the number of loads is not that of the columns, or one is negative.
    """
    if len(load) != placement.num_columns or any(amount < 0 for amount in load):
        raise PlanError(
            f"{len(load)} loads do not describe {placement.num_columns} expert columns",
            hint="Give one number that is not negative for each column",
        )
    shares = _Shares(placement, ranks, load, redundant)
    shares.drop_copies()
    shares.swap_columns()
    tried = [(shares.fullest_load(), shares.placement())]
    while shares.add_copy():
        shares.swap_columns()
        tried.append((shares.fullest_load(), shares.placement()))
    best = min(most for most, _ in tried)
    return next(found for most, found in tried if most <= best + shares.least_gain)


class _Shares:
    """A placement that is changed step by step.

    Attributes:
        owned, copied: rank -> the columns that it owns, and of which it has a copy.
        loads: rank -> its load. least_gain: by which a step has to lower the fullest one.
    """

    def __init__(self, placement: Placement, ranks: Sequence[int], load: Sequence[float], redundant: int) -> None:
        self._load = load
        self._redundant = redundant
        self._room = -(-redundant // len(ranks))
        self._holders = [len(placement.holders(column)) for column in range(placement.num_columns)]
        self.owned = {rank: set(placement.owned_by(rank)) for rank in ranks}
        self.copied: dict[int, set[int]] = {rank: set() for rank in ranks}
        for column, rank in placement.copies:
            self.copied[rank].add(column)
        self.loads = dict.fromkeys(ranks, 0.0)
        self._weigh()
        self.least_gain = _LEAST_GAIN * sum(self.loads.values()) / len(self.loads)

    def placement(self) -> Placement:
        owners = {column: rank for rank, columns in self.owned.items() for column in columns}
        copies = sorted((column, rank) for rank, columns in self.copied.items() for column in columns)
        return Placement(owners=tuple(owners[column] for column in range(len(owners))), copies=tuple(copies))

    def fullest_load(self) -> float:
        return max(self.loads.values())

    def share(self, column: int) -> float:
        """Load of each of the column's holders."""
        return self._load[column] / self._holders[column]

    def _holding(self, column: int) -> list[int]:
        return [rank for rank in self.loads if column in self.owned[rank] or column in self.copied[rank]]

    def _weigh(self) -> None:
        """From the beginning, so that the loads do not depend on the way to this placement."""
        self.loads = dict.fromkeys(self.loads, 0.0)
        for rank in self.loads:
            self.loads[rank] = sum(self.share(column) for column in sorted(self.owned[rank] | self.copied[rank]))

    def _drop(self, rank: int, column: int) -> None:
        self.copied[rank].remove(column)
        self._holders[column] -= 1
        self._weigh()

    def _add(self, rank: int, column: int) -> None:
        self.copied[rank].add(column)
        self._holders[column] += 1
        self._weigh()

    def _num_copies(self) -> int:
        return sum(map(len, self.copied.values()))

    def _share_without(self, column: int) -> float:
        """Load of each of the column's holders if they were one less."""
        return self._load[column] / (self._holders[column] - 1)

    def drop_copies(self) -> None:
        """Those that are too many, on a rank or over all, where least load comes back."""
        for rank, columns in self.copied.items():
            while len(columns) > self._room:
                self._drop(rank, min(columns, key=lambda column: (self._share_without(column), column)))
        while self._num_copies() > self._redundant:
            every = [
                (self._share_without(column), column, rank) for rank in self.copied for column in self.copied[rank]
            ]
            _, column, rank = min(every)
            self._drop(rank, column)

    def add_copy(self) -> bool:
        """Copy the column with the most load for each holder that can be copied; in the place of a copy that is needed
        less, once there are as many as there may be. Whether there was one."""
        for column in sorted(range(len(self._load)), key=lambda column: (-self.share(column), column)):
            holding = self._holding(column)
            others = [rank for rank in self.loads if rank not in holding]
            roomy = [rank for rank in others if len(self.copied[rank]) < self._room]
            if roomy and self._num_copies() < self._redundant:
                self._add(min(roomy, key=lambda rank: (self.loads[rank], rank)), column)
                return True
            copies = ((self._share_without(copied), copied, rank) for rank in others for copied in self.copied[rank])
            least, copied, rank = min(copies, default=(self.share(column), -1, -1))
            if least < self.share(column):
                self._drop(rank, copied)
                self._add(rank, column)
                return True
        return False

    def swap_columns(self) -> None:
        """Swap columns, and copies of columns, until no swap helps."""
        # Each swap lowers the fullest rank's load, or the number of ranks that have it. The bound is for rounding.
        for _ in range(len(self._load) * len(self.loads)):
            fullest = max(self.loads, key=lambda rank: (self.loads[rank], -rank))
            swap = max(self._swaps(fullest), default=None, key=lambda swap: swap.order)
            if swap is None or swap.gain <= self.least_gain:
                break
            self._carry_out(fullest, swap)

    def _carry_out(self, fullest: int, swap: _Swap) -> None:
        held = self.copied if swap.copies else self.owned
        held[fullest].remove(swap.given)
        held[swap.other].add(swap.given)
        if swap.taken is not None:
            held[swap.other].remove(swap.taken)
            held[fullest].add(swap.taken)
        self._weigh()

    def _swaps(self, fullest: int) -> Iterator[_Swap]:
        """For each column of the fullest rank and each other rank the best swap that helps."""
        for other in self.loads:
            gap = self.loads[fullest] - self.loads[other]
            if other == fullest or gap <= 0:
                continue
            for copies, held in ((False, self.owned), (True, self.copied)):
                yield from self._swaps_with(fullest, other, gap, held, copies)

    def _swaps_with(
        self, fullest: int, other: int, gap: float, held: dict[int, set[int]], copies: bool
    ) -> Iterator[_Swap]:
        here = self.owned[fullest] | self.copied[fullest]
        there = self.owned[other] | self.copied[other]
        takeable: list[tuple[float, int | None]] = [(self.share(column), column) for column in held[other] - here]
        if copies and len(self.copied[other]) < self._room:
            takeable.append((0.0, None))
        takeable.sort(key=lambda item: (item[0], -1 if item[1] is None else item[1]))
        amounts = [amount for amount, _ in takeable]
        for given in held[fullest] - there:
            # The gain is largest where the two loads become equal, so where the difference is half the gap.
            middle = bisect_left(amounts, self.share(given) - gap / 2)
            for amount, taken in takeable[max(0, middle - 1) : middle + 1]:
                difference = self.share(given) - amount
                gain = min(difference, gap - difference)
                if gain > 0:
                    yield _Swap(gain=gain, given=given, taken=taken, other=other, copies=copies)


@dataclass(frozen=True, kw_only=True)
class _Swap:
    """The fullest rank's column `given` for column `taken` of rank `other`, owned ones or `copies`; taken: None: there
    is room for it. gain: by how much the larger of their loads falls."""

    gain: float
    given: int
    taken: int | None
    other: int
    copies: bool

    @property
    def order(self) -> tuple[float, int, int, int, bool]:
        """The best swap has the largest gain; of equal ones the same for the same placement."""
        return self.gain, -self.other, -self.given, -1 if self.taken is None else -self.taken, not self.copies
