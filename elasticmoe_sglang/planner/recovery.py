"""Plan of a recovery: the membership after the death of workers, and the columns that survivors pull. No I/O."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from elasticmoe_sglang.comm.membership import LEADER, Membership
from elasticmoe_sglang.planner import ColumnMove, Placement, RetireRanks, plan_scale


@dataclass(frozen=True, kw_only=True)
class RecoveryPlan:
    """How to continue after the death of workers.

    Attributes:
        membership, placement: after the recovery.
        dead: active ranks whose workers died.
        replaced: those of them that a standby worker serves from now on: rank 0, on which SGLang's control messages and
            the commit barrier depend, and with `replace_all` every dead rank.
        moves: columns that survivors pull; the HMM still holds them on the dead rank's device.
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
    """Plan to continue without the dead ranks, or with standby workers for them.

    Args:
        membership, placement: as committed last.
        dead: ranks whose workers died.
        replace_all: replace the worker of every dead rank instead of moving its columns to survivors.
    """
    lost = tuple(sorted(set(dead) & set(membership.ranks)))
    replaced = lost if replace_all else tuple(rank for rank in lost if rank == LEADER)
    retired = tuple(rank for rank in lost if rank not in replaced)
    if retired:
        plan = plan_scale(membership, placement, RetireRanks(ranks=retired))
        after, owners, moves = plan.after, plan.placement_after, plan.moves
    else:
        after = Membership(ranks=membership.ranks, epoch=membership.epoch + 1, capacity=membership.capacity)
        owners, moves = placement, ()
    return RecoveryPlan(membership=after, placement=owners, dead=lost, replaced=replaced, moves=moves)
