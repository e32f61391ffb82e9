"""Which seat holds which expert column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from elasticmoe_sglang.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """owners[c] is the seat that holds expert column c; every column is held exactly once."""

    owners: tuple[int, ...]

    @property
    def num_columns(self) -> int:
        return len(self.owners)

    def columns_of(self, seat: int) -> tuple[int, ...]:
        """The columns on `seat`, ascending."""
        return tuple(column for column, owner in enumerate(self.owners) if owner == seat)

    def counts(self) -> dict[int, int]:
        """Number of columns on each seat that holds any."""
        return dict(Counter(self.owners))

    def is_balanced_over(self, seats: Sequence[int]) -> bool:
        """True when only `seats` hold columns and no two of them differ by more than one column."""
        counts = self.counts()
        held = [counts.get(seat, 0) for seat in seats]
        return sum(held) == self.num_columns and max(held) - min(held) <= 1


def initial_placement(num_columns: int, seats: Sequence[int]) -> Placement:
    """Contiguous runs of columns over `seats` in ascending order; the first seats get the odd columns.

    Raises:
        PlanError: no column, no seat, or a seat named twice.
    """
    if num_columns < 1:
        raise PlanError(f"a model with {num_columns} expert columns cannot be placed")
    if not seats or len(set(seats)) != len(seats):
        raise PlanError(f"columns cannot be placed on seats {list(seats)}", hint="Name one seat or more, each once")
    share, odd = divmod(num_columns, len(seats))
    owners: list[int] = []
    for index, seat in enumerate(sorted(seats)):
        owners += [seat] * (share + (index < odd))
    return Placement(owners=tuple(owners))
