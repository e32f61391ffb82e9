"""Which rank holds which expert column, and the view: who is active and who holds what, in one value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """owners[c] is the rank that holds expert column c; every column is held exactly once."""

    owners: tuple[int, ...]

    @property
    def num_columns(self) -> int:
        return len(self.owners)

    def columns_of(self, rank: int) -> tuple[int, ...]:
        """The columns on `rank`, ascending."""
        return tuple(column for column, owner in enumerate(self.owners) if owner == rank)

    def counts(self) -> dict[int, int]:
        """Number of columns on each rank that holds any."""
        return dict(Counter(self.owners))

    def is_balanced_over(self, ranks: Sequence[int]) -> bool:
        """True when only `ranks` hold columns and no two of them differ by more than one column."""
        counts = self.counts()
        held = [counts.get(rank, 0) for rank in ranks]
        return sum(held) == self.num_columns and max(held) - min(held) <= 1


@dataclass(frozen=True, kw_only=True)
class View:
    """What all processes of a server agree on: membership and placement of one epoch, published together.

    Attributes:
        placement: without owners until the first workers have read how many columns the model has.

    Raises:
        PlanError: a column belongs to a rank that is not active.
    """

    membership: Membership
    placement: Placement

    def __post_init__(self) -> None:
        strangers = set(self.placement.owners) - set(self.membership.ranks)
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
        """owners[c] is the rank that holds expert column c."""
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
