"""Who is there: the set of occupied seats and the epoch that names it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from elasticmoe_sglang.errors import UserInputError

MAX_CAPACITY = 64
"""Seats one host's control page can name: a membership is one 64-bit mask word."""

LEADER = 0
"""Seat 0 is always occupied: SGLang's controls enter there, and it decides at the commit gate."""


def seats_to_mask(seats: Iterable[int]) -> int:
    """Bit i set for seat i."""
    mask = 0
    for seat in seats:
        mask |= 1 << seat
    return mask


def mask_to_seats(mask: int) -> tuple[int, ...]:
    """The seats whose bit is set, ascending."""
    return tuple(seat for seat in range(MAX_CAPACITY) if mask >> seat & 1)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """The occupied seats of one epoch.

    Raises:
        UserInputError: seats unsorted, repeated, out of range, without seat 0, or a negative epoch.
    """

    seats: tuple[int, ...]
    """Occupied seats, ascending, seat 0 among them."""
    epoch: int
    """Grows by one at every change."""
    capacity: int
    """Number of seats, SGLang's world size; constant while the server lives."""

    def __post_init__(self) -> None:
        if self.epoch < 0:
            raise UserInputError(f"epoch {self.epoch} is negative")
        if tuple(sorted(set(self.seats))) != self.seats or LEADER not in self.seats:
            raise UserInputError(
                f"seats {self.seats} are not a membership", hint="List each seat once, ascending, seat 0 first."
            )
        if self.seats[-1] >= self.capacity:
            raise UserInputError(f"seat {self.seats[-1]} does not exist among {self.capacity} seats")

    @property
    def size(self) -> int:
        """How many seats are occupied, the EP size."""
        return len(self.seats)

    @property
    def mask(self) -> int:
        """Bit i set for an occupied seat i."""
        return seats_to_mask(self.seats)

    def next(self, seats: Iterable[int]) -> Membership:
        """The membership one epoch later with these seats."""
        return Membership(seats=tuple(sorted(seats)), epoch=self.epoch + 1, capacity=self.capacity)
