"""From one view to the next: joining and retiring ranks, and the fewest column moves to a balanced placement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from elasticmoe_sglang.comm.membership import LEADER, Membership
from elasticmoe_sglang.errors import PlanError
from elasticmoe_sglang.planner.placement import Placement, View
from elasticmoe_sglang.planner.rebalance import Rebalance, balanced


@dataclass(frozen=True, kw_only=True)
class ScaleTo:
    """Target: this number of active ranks."""

    size: int


@dataclass(frozen=True, kw_only=True)
class RetireRanks:
    """Target: the active ranks without these."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RestoreRanks:
    """Target: the active ranks and these: the reverse of `RetireRanks`."""

    ranks: tuple[int, ...]


Target = ScaleTo | RetireRanks | RestoreRanks | Rebalance


@dataclass(frozen=True, kw_only=True)
class ColumnMove:
    """Rank `target` gets expert column `column`, which rank `source` holds: as its new owner, or a copy of it."""

    column: int
    source: int
    target: int


class Cause(str, Enum):
    """Why the view changes.

    target: somebody asked for it. loss: workers of active ranks died, or their collectives failed. restore: ranks that
    were lost come back, as the last target wants them.
    """

    TARGET = "target"
    LOSS = "loss"
    RESTORE = "restore"


@dataclass(frozen=True, kw_only=True)
class TransitionPlan:
    """The way from one view to the next.

    Attributes:
        before, after: after.epoch is before.epoch + 1, unless nothing changes (`is_noop`).
        joining: ranks for which a standby worker boots, ascending: those that become active, and those that are `lost`
            and stay active.
        retiring: ranks that hand their requests over and end, ascending.
        lost: active ranks whose workers have died, ascending.
        survivors: ranks active before and after whose workers live, ascending.
        moves: ascending by column and target. The HMM still holds the columns of lost ranks on their devices. Where a
            rank with a copy becomes the owner, nothing moves.
    """

    cause: Cause
    before: View
    after: View
    joining: tuple[int, ...]
    retiring: tuple[int, ...]
    lost: tuple[int, ...]
    survivors: tuple[int, ...]
    moves: tuple[ColumnMove, ...]

    @property
    def is_noop(self) -> bool:
        """Whether nothing has to change: no rank joins or retires, none was lost, and every column stays."""
        return self.after.epoch == self.before.epoch

    @property
    def participants(self) -> tuple[int, ...]:
        """Who meets at the commit barrier."""
        return tuple(sorted({*self.survivors, *self.joining, *self.retiring}))

    def incoming(self, rank: int) -> tuple[ColumnMove, ...]:
        """The moves that end on `rank`."""
        return tuple(move for move in self.moves if move.target == rank)

    def departing(self, rank: int) -> tuple[int, ...]:
        """The columns that `rank` holds before and not after, ascending."""
        kept = set(self.after.placement.columns_of(rank))
        return tuple(column for column in self.before.placement.columns_of(rank) if column not in kept)


def plan_target(view: View, target: Target, *, replica_size: int = 1) -> TransitionPlan:
    """The change to `target`.

    A larger size adds the lowest inactive ranks, a smaller one retires the highest active ones, never rank 0.
    A column moves only if its rank retires or owns more than its share, so the number of moves is the smallest that
    any balanced placement over the new ranks needs; a column that has copies may need none, because a rank with one
    becomes its owner. `Rebalance` keeps the ranks and the number of columns that each owns. The same arguments give
    the same plan.

    Args:
        replica_size: ranks of an attention replica, which join and retire together.

    Raises:
        PlanError: the target is no legal membership; the text says what is allowed.
    """
    if isinstance(target, Rebalance):
        placement = balanced(view.placement, view.ranks, target.load, redundant=target.redundant)
        return _plan(Cause.TARGET, view, view.ranks, placement=placement)
    return _plan(Cause.TARGET, view, _ranks_after(view.membership, target, replica_size))


def plan_restore(view: View, ranks: Collection[int]) -> TransitionPlan:
    """The way back to the active ranks of `view` and these."""
    return _plan(Cause.RESTORE, view, tuple(sorted({*view.ranks, *ranks})))


def plan_loss(view: View, lost: Collection[int], *, replace_all: bool = False, replica_size: int = 1) -> TransitionPlan:
    """How to go on after workers of active ranks have died: without their ranks, or with standby workers for them.

    Rank 0 is always replaced, because SGLang's control messages and the commit barrier depend on it, and with it the
    other ranks of its replica.

    Args:
        lost: ranks of `view`; none when its workers live and their collectives failed: they meet again. Whoever shares
            an attention replica with one of them is lost too: it has a part of the replica's KV only.
        replace_all: replace the worker of every lost rank instead of moving its columns to survivors.
        replica_size: ranks of an attention replica.
    """
    dead = whole_replicas(view.ranks, lost, replica_size)
    replaced = dead if replace_all else tuple(rank for rank in dead if rank // replica_size == LEADER)
    ranks = tuple(rank for rank in view.ranks if rank not in dead or rank in replaced)
    return _plan(Cause.LOSS, view, ranks, lost=dead)


def whole_replicas(ranks: Iterable[int], some: Iterable[int], replica_size: int) -> tuple[int, ...]:
    """Those of `ranks` that share an attention replica with any of `some`, in their order."""
    replicas = {rank // replica_size for rank in some}
    return tuple(rank for rank in ranks if rank // replica_size in replicas)


def _plan(
    cause: Cause,
    view: View,
    ranks: tuple[int, ...],
    lost: tuple[int, ...] = (),
    placement: Placement | None = None,
) -> TransitionPlan:
    """placement: None: a balanced one over `ranks` with the fewest moves."""
    if placement is None:
        # After a loss columns move only from ranks that go: balance is for changes that nobody's streams wait for.
        placement = _settled(view.placement, ranks, keep=cause is Cause.LOSS)
    old, new = set(view.ranks), set(ranks)
    changed = placement != view.placement or old != new or cause is Cause.LOSS
    membership = Membership(ranks=ranks, epoch=view.epoch + changed, capacity=view.membership.capacity)
    before = set(view.placement.held())
    moves = (
        ColumnMove(column=column, source=view.owners[column], target=rank)
        for column, rank in placement.held()
        if (column, rank) not in before
    )
    return TransitionPlan(
        cause=cause,
        before=view,
        after=View(membership=membership, placement=placement),
        joining=tuple(sorted((new - old) | (new & set(lost)))),
        retiring=tuple(sorted(old - new - set(lost))),
        lost=lost,
        survivors=tuple(sorted((old & new) - set(lost))),
        moves=tuple(moves),
    )


def _ranks_after(membership: Membership, target: ScaleTo | RetireRanks | RestoreRanks, size: int) -> tuple[int, ...]:
    if isinstance(target, ScaleTo):
        return _ranks_for_size(membership, target.size, size)
    if isinstance(target, RestoreRanks):
        return _ranks_with(membership, target.ranks, size)
    return _ranks_without(membership, target.ranks, size)


def _ranks_for_size(membership: Membership, size: int, replica_size: int) -> tuple[int, ...]:
    if not 1 <= size <= membership.capacity or size % replica_size:
        wanted = f"a size from 1 to {membership.capacity}"
        if replica_size > 1:
            wanted = f"a multiple of {replica_size}, the ranks of an attention replica, up to {membership.capacity}"
        raise PlanError(
            f"the EP size {size} is not possible on this server",
            hint=f"It has {_count(membership.capacity, 'rank')}: ask for {wanted}",
        )
    if size <= len(membership.ranks):
        return membership.ranks[:size]
    return tuple(sorted((*membership.ranks, *_inactive(membership)[: size - len(membership.ranks)])))


def _ranks_without(membership: Membership, retired: tuple[int, ...], size: int) -> tuple[int, ...]:
    hint = _retirable(membership, size)
    if not retired:
        raise PlanError("retire_ranks is empty", hint=hint)
    if len(set(retired)) != len(retired):
        raise PlanError(f"a rank is repeated in {list(retired)}", hint="List each rank to retire once")
    if 0 in retired:
        raise PlanError("rank 0 cannot be retired, because it leads the commit barrier", hint=hint)
    absent = sorted(set(retired) - set(membership.ranks))
    if absent:
        listed = ", ".join(map(str, absent))
        plural, verb = ("", "is") if len(absent) == 1 else ("s", "are")
        raise PlanError(f"rank{plural} {listed} {verb} not active", hint=hint)
    _require_replicas(retired, size, hint)
    return tuple(rank for rank in membership.ranks if rank not in retired)


def _ranks_with(membership: Membership, restored: tuple[int, ...], size: int) -> tuple[int, ...]:
    hint = _restorable(membership, size)
    if not restored:
        raise PlanError("restore_ranks is empty", hint=hint)
    if len(set(restored)) != len(restored):
        raise PlanError(f"a rank is repeated in {list(restored)}", hint="List each rank to restore once")
    wrong = sorted(set(restored) - set(_inactive(membership)))
    if wrong:
        listed = ", ".join(map(str, wrong))
        plural, verb = ("", "is") if len(wrong) == 1 else ("s", "are")
        raise PlanError(f"rank{plural} {listed} {verb} not inactive", hint=hint)
    _require_replicas(restored, size, hint)
    return tuple(sorted((*membership.ranks, *restored)))


def _require_replicas(ranks: tuple[int, ...], size: int, hint: str) -> None:
    """Raises PlanError where a part of an attention replica is named."""
    for replica in sorted({rank // size for rank in ranks}):
        whole = _of_replica(replica, size)
        if missing := [rank for rank in whole if rank not in ranks]:
            named = ", ".join(str(rank) for rank in whole if rank in ranks)
            raise PlanError(
                f"rank {named} cannot be named without rank {', '.join(map(str, missing))} of its attention replica",
                hint=hint,
            )


def _inactive(membership: Membership) -> list[int]:
    return [rank for rank in range(membership.capacity) if rank not in membership.ranks]


def _restorable(membership: Membership, size: int) -> str:
    others = _listed(_inactive(membership), size)
    if not others:
        return "All ranks are active, so none can be restored now"
    return f"Ranks that can be restored now: {others}"


def _retirable(membership: Membership, size: int) -> str:
    others = _listed([rank for rank in membership.ranks if rank // size != LEADER], size)
    if not others:
        only = "Only rank 0 is active" if size == 1 else "Only the replica of rank 0 is active"
        return f"{only}, so none can be retired now"
    return f"Ranks that can be retired now: {others}"


def _of_replica(replica: int, size: int) -> range:
    return range(replica * size, (replica + 1) * size)


def _listed(ranks: list[int], size: int) -> str:
    """Ranks, or where a replica has several, its ranks together: "2 and 3, 4 and 5"."""
    replicas = sorted({rank // size for rank in ranks})
    return ", ".join(" and ".join(map(str, _of_replica(replica, size))) for replica in replicas)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _settled(placement: Placement, ranks: tuple[int, ...], *, keep: bool) -> Placement:
    """A placement over `ranks` (ascending). Copies on them stay, and one becomes its column where the owner goes.

    Args:
        keep: every column on `ranks` stays with its owner, balanced or not.
    """
    copies = [copy for copy in placement.copies if copy[1] in ranks]
    owners = _inherited(placement.owners, copies, ranks)
    targets = _fewest_moves(Placement(owners=owners), ranks, keep=keep)
    after = tuple(targets.get(column, owner) for column, owner in enumerate(owners))
    return Placement(owners=after, copies=tuple(copy for copy in copies if after[copy[0]] != copy[1]))


def _inherited(owners: tuple[int, ...], copies: Sequence[tuple[int, int]], ranks: tuple[int, ...]) -> tuple[int, ...]:
    """The owners, where each column of a rank that goes belongs to the one of `ranks` with a copy that owns least."""
    after = list(owners)
    owned = Counter(owner for owner in owners if owner in ranks)
    for column, owner in enumerate(owners):
        heirs = [rank for copied, rank in copies if copied == column] if owner not in ranks else []
        if heirs:
            after[column] = min(heirs, key=lambda rank: (owned[rank], rank))
            owned[after[column]] += 1
    return tuple(after)


def _fewest_moves(placement: Placement, ranks: tuple[int, ...], *, keep: bool) -> dict[int, int]:
    """Column -> its next owner, to a balanced placement over `ranks` (ascending), with as few moves as there can be.

    With n columns over k ranks, n mod k ranks own one column more than n // k. Choosing ranks that own more than
    n // k already saves one move each, and nothing else can save a move.

    Args:
        keep: move only what belongs to none of `ranks`, to those that own least.
    """
    owned = {rank: placement.owned_by(rank) for rank in ranks}
    if keep:
        quota = {rank: len(columns) for rank, columns in owned.items()}
        for _ in range(placement.num_columns - sum(quota.values())):
            quota[min(ranks, key=lambda rank: (quota[rank], rank))] += 1
    else:
        share, odd = divmod(placement.num_columns, len(ranks))
        by_need = sorted(ranks, key=lambda rank: (len(owned[rank]) <= share, rank))
        quota = {rank: share + (place < odd) for place, rank in enumerate(by_need)}

    kept = {column for rank in ranks for column in owned[rank][: quota[rank]]}
    surplus: dict[int, list[int]] = {}
    for column, owner in enumerate(placement.owners):
        if column not in kept:
            surplus.setdefault(owner, []).append(column)
    wanting = {rank: quota[rank] - len(owned[rank]) for rank in ranks if quota[rank] > len(owned[rank])}
    # Round robin on both sides: every receiver pulls from many sources, which spreads the load over all links.
    targets = _round_robin([rank] * need for rank, need in wanting.items())
    return dict(zip(_round_robin(surplus.values()), targets, strict=True))


def _round_robin(rows: Iterable[list[int]]) -> Iterator[int]:
    """The first items of all rows, then the second ones, and so on."""
    lists = list(rows)
    for index in range(max(map(len, lists), default=0)):
        for row in lists:
            if index < len(row):
                yield row[index]
