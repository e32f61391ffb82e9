"""The membership: the set of active ranks and the epoch that names it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from elasticmoe_sglang.errors import UserInputError

MAX_CAPACITY = 64
"""The most ranks: the control page holds a membership as one 64-bit mask."""

LEADER = 0
"""Rank 0 is always active: SGLang's control messages enter there, and it leads the commit barrier."""


def ranks_to_mask(ranks: Iterable[int]) -> int:
    """Bit i set for rank i."""
    mask = 0
    for rank in ranks:
        mask |= 1 << rank
    return mask


def mask_to_ranks(mask: int) -> tuple[int, ...]:
    """The ranks whose bit is set, ascending."""
    return tuple(rank for rank in range(MAX_CAPACITY) if mask >> rank & 1)


@dataclass(frozen=True, kw_only=True)
class Membership:
    """The active ranks of one epoch.

    Raises:
        UserInputError: ranks unsorted, repeated, out of range, without rank 0, or a negative epoch.
    """

    ranks: tuple[int, ...]
    """Active ranks, ascending, rank 0 among them."""
    epoch: int
    """Grows by one at every change."""
    capacity: int
    """Number of ranks, SGLang's world size; constant while the server lives."""

    def __post_init__(self) -> None:
        if self.epoch < 0:
            raise UserInputError(f"epoch {self.epoch} is negative")
        if tuple(sorted(set(self.ranks))) != self.ranks or LEADER not in self.ranks:
            raise UserInputError(
                f"ranks {self.ranks} are not a membership", hint="List each rank once, ascending, rank 0 first."
            )
        if self.ranks[-1] >= self.capacity:
            raise UserInputError(f"rank {self.ranks[-1]} does not exist among {self.capacity} ranks")

    @property
    def size(self) -> int:
        """How many ranks are active, the EP size."""
        return len(self.ranks)

    @property
    def mask(self) -> int:
        """Bit i set for an active rank i."""
        return ranks_to_mask(self.ranks)

    def next(self, ranks: Iterable[int]) -> Membership:
        """The membership one epoch later with these ranks."""
        return Membership(ranks=tuple(sorted(ranks)), epoch=self.epoch + 1, capacity=self.capacity)
