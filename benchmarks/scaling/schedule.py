"""When the size changes: "30:4,90:2" means 4 devices from second 30 on, and 2 from second 90 on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from elasticmoe_sglang.errors import UserInputError


@dataclass(frozen=True, kw_only=True)
class PlannedChange:
    """At `at` seconds after the run's start the service is asked to have `size` devices."""

    at: float
    size: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The size to start with and the changes, in order of time."""

    start: int
    changes: tuple[PlannedChange, ...]

    @classmethod
    def parse(cls, start: int, text: str) -> Schedule:
        """Raises UserInputError for anything but increasing times and sizes of at least 1 that differ."""
        changes = []
        for part in filter(None, text.split(",")):
            moment, _, size = part.partition(":")
            try:
                changes.append(PlannedChange(at=float(moment), size=int(size)))
            except ValueError as error:
                raise UserInputError(f"{part!r} is no change", hint="Write SECOND:SIZE, like 30:4") from error
        made = cls(start=start, changes=tuple(changes))
        sizes = made.sizes
        if any(a.at >= b.at for a, b in itertools.pairwise(changes)):
            raise UserInputError(f"the times of {text!r} do not grow")
        if min(sizes) < 1 or any(a == b for a, b in itertools.pairwise(sizes)):
            raise UserInputError(f"the sizes {sizes} must be at least 1 and change each time")
        return made

    @property
    def sizes(self) -> list[int]:
        return [self.start, *(change.size for change in self.changes)]

    @property
    def largest(self) -> int:
        return max(self.sizes)
