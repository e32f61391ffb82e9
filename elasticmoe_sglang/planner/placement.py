"""Which rank holds which expert column, and the view: who is active and who holds what, in one value."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import PlanError

TURNS = 60
"""Rows of a batch are dealt to a column's holders in a cycle of so many turns: a multiple of every number of holders
from 1 to 6, so that their shares are equal; more holders' shares differ by one turn."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Which ranks hold which expert columns: each column its owner and, if it has copies, further ranks.

    Attributes:
        owners: owners[c] is the rank that owns expert column c.
        copies: (column, rank) of each further copy, ascending.

    Raises:
        PlanError: copies are unsorted or repeated, of a column that does not exist, or where its owner is.
    """

    owners: tuple[int, ...]
    copies: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.copies and tuple(sorted(set(self.copies))) != self.copies:
            raise PlanError(f"copies {list(self.copies)} are not ascending")
        for column, rank in self.copies:
            if not 0 <= column < len(self.owners):
                raise PlanError(f"rank {rank} has a copy of expert column {column}, which does not exist")
            if self.owners[column] == rank:
                raise PlanError(f"rank {rank} owns expert column {column} and has a copy of it")

    @property
    def num_columns(self) -> int:
        return len(self.owners)

    @cached_property
    def _copies_of(self) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = defaultdict(tuple)
        for column, rank in self.copies:
            found[column] += (rank,)
        return dict(found)

    def copied(self) -> dict[int, tuple[int, ...]]:
        """Column -> the ranks with a copy of it, ascending; columns without copies are left out."""
        return dict(self._copies_of)

    def holders(self, column: int) -> tuple[int, ...]:
        """The ranks that hold `column`, ascending: its owner and those with a copy."""
        return tuple(sorted((self.owners[column], *self._copies_of.get(column, ()))))

    def held(self) -> Iterator[tuple[int, int]]:
        """(column, rank) for each column and each rank that holds it, ascending."""
        for column in range(self.num_columns):
            for rank in self.holders(column):
                yield column, rank

    def columns_of(self, rank: int) -> tuple[int, ...]:
        """The columns on `rank`, owned or copies, ascending."""
        copied = [column for column, holder in self.copies if holder == rank]
        return tuple(sorted((*self.owned_by(rank), *copied)))

    def owned_by(self, rank: int) -> tuple[int, ...]:
        """The columns that `rank` owns, ascending."""
        return tuple(column for column, owner in enumerate(self.owners) if owner == rank)

    def shared_by(self, rank: int) -> dict[int, tuple[int, int]]:
        """The columns on `rank` that others hold too: column -> (place of `rank` among the holders, their number)."""
        found = {}
        for column in self._copies_of:
            holders = self.holders(column)
            if rank in holders:
                found[column] = holders.index(rank), len(holders)
        return found

    def counts(self) -> dict[int, int]:
        """Number of columns that each rank owns, of those that own any."""
        return dict(Counter(self.owners))

    def is_balanced_over(self, ranks: Sequence[int]) -> bool:
        """True when only `ranks` own columns and no two of them differ by more than one column."""
        counts = self.counts()
        owned = [counts.get(rank, 0) for rank in ranks]
        return sum(owned) == self.num_columns and max(owned) - min(owned) <= 1


def turns_of(column: int, place: int, holders: int) -> range:
    """The turns in which the holder at this place among a column's holders computes it: of all holders each turn is in
    one's, and columns begin with different holders."""
    return range((place - column) % holders, TURNS, holders)


@dataclass(frozen=True, kw_only=True)
class View:
    """What all processes of a server agree on: membership and placement of one epoch, published together.

    Attributes:
        placement: without owners until the first workers have read how many columns the model has.

    Raises:
        PlanError: a column, or a copy of one, is on a rank that is not active.
    """

    membership: Membership
    placement: Placement

    def __post_init__(self) -> None:
        holders = {*self.placement.owners, *(rank for _, rank in self.placement.copies)}
        strangers = holders - set(self.membership.ranks)
        if strangers:
            raise PlanError(
                f"ranks {sorted(strangers)} hold expert columns and are not active", epoch=self.membership.epoch
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        """The active ranks, ascending."""
        return self.membership.ranks

    @property
    def epoch(self) -> int:
        return self.membership.epoch

    @property
    def owners(self) -> tuple[int, ...]:
        """owners[c] is the rank that owns expert column c."""
        return self.placement.owners


def initial_placement(num_columns: int, ranks: Sequence[int]) -> Placement:
    """Contiguous runs of columns over `ranks` in ascending order; the first ranks get one more if they do not divide.

    Raises:
        PlanError: no column, no rank, or a repeated rank.
    """
    if num_columns < 1:
        raise PlanError(f"a model with {num_columns} expert columns cannot be placed")
    if not ranks or len(set(ranks)) != len(ranks):
        raise PlanError(f"columns cannot be placed on ranks {list(ranks)}", hint="Name one rank or more, each once")
    share, odd = divmod(num_columns, len(ranks))
    owners: list[int] = []
    for index, rank in enumerate(sorted(ranks)):
        owners += [rank] * (share + (index < odd))
    return Placement(owners=tuple(owners))
