"""After a rank's death: which membership goes on, and what each survivor has to fetch for it. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.planner import ColumnMove, Placement, RetireRanks, plan_scale

LEADER_RANK = 0


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """Attributes:
    membership, placement: as they will be.
    dead: the ranks that were lost.
    replaced: those of them that a standby takes over where they were: rank 0, which SGLang's control messages and the
        barrier depend on, and every lost rank whose columns the others have no room for.
    moves: columns that survivors take over; their memory is still in the HMM, on the dead rank's device.
    """

    membership: Membership
    placement: Placement
    dead: tuple[int, ...]
    replaced: tuple[int, ...]
    moves: tuple[ColumnMove, ...]

    @property
    def survivors(self) -> tuple[int, ...]:
        return tuple(rank for rank in self.membership.ranks if rank not in self.replaced)

    def incoming(self, rank: int) -> tuple[ColumnMove, ...]:
        return tuple(move for move in self.moves if move.target == rank)


def plan_recovery(
    membership: Membership, placement: Placement, dead: Collection[int], *, replace_all: bool = False
) -> RecoveryPlan:
    """Go on without the dead ranks, or with standbys in their places.

    Args:
        membership, placement: as committed last.
        dead: lost members.
        replace_all: put a standby into every lost rank instead of spreading its columns.
    """
    lost = tuple(sorted(set(dead) & set(membership.ranks)))
    replaced = lost if replace_all else tuple(rank for rank in lost if rank == LEADER_RANK)
    retired = tuple(rank for rank in lost if rank not in replaced)
    if retired:
        plan = plan_scale(membership, placement, RetireRanks(ranks=retired))
        after, owners, moves = plan.after, plan.placement_after, plan.moves
    else:
        after = Membership(ranks=membership.ranks, epoch=membership.epoch + 1, capacity=membership.capacity)
        owners, moves = placement, ()
    return RecoveryPlan(membership=after, placement=owners, dead=lost, replaced=replaced, moves=moves)
