"""After a seat's death: which membership goes on, and what each survivor has to fetch for it. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from elasticmoe_sglang.planner import ColumnMove, Placement, RetireSeats, plan_scale
from elasticmoe_sglang.seats.membership import Membership

LEADER_SEAT = 0


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """Attributes:
    membership, placement: as they will be.
    dead: the seats that were lost.
    replaced: those of them that a standby takes over where they were: seat 0, which SGLang's control messages and the
        gate depend on, and every lost seat whose columns the others have no room for.
    moves: columns that survivors take over; their memory is still in the HMM, on the dead seat's device.
    """

    membership: Membership
    placement: Placement
    dead: tuple[int, ...]
    replaced: tuple[int, ...]
    moves: tuple[ColumnMove, ...]

    @property
    def survivors(self) -> tuple[int, ...]:
        return tuple(seat for seat in self.membership.seats if seat not in self.replaced)

    def incoming(self, seat: int) -> tuple[ColumnMove, ...]:
        return tuple(move for move in self.moves if move.target == seat)


def plan_recovery(
    membership: Membership, placement: Placement, dead: Collection[int], *, replace_all: bool = False
) -> RecoveryPlan:
    """Go on without the dead seats, or with standbys in their places.

    Args:
        membership, placement: as committed last.
        dead: lost members.
        replace_all: put a standby into every lost seat instead of spreading its columns.
    """
    lost = tuple(sorted(set(dead) & set(membership.seats)))
    replaced = lost if replace_all else tuple(seat for seat in lost if seat == LEADER_SEAT)
    retired = tuple(seat for seat in lost if seat not in replaced)
    if retired:
        plan = plan_scale(membership, placement, RetireSeats(seats=retired))
        after, owners, moves = plan.after, plan.placement_after, plan.moves
    else:
        after = Membership(seats=membership.seats, epoch=membership.epoch + 1, capacity=membership.capacity)
        owners, moves = placement, ()
    return RecoveryPlan(membership=after, placement=owners, dead=lost, replaced=replaced, moves=moves)
