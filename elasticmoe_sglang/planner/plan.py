"""From a wish to a `ScalePlan`: which seats join and leave, and the fewest column moves that balance what is left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from elasticmoe_sglang.errors import PlanError
from elasticmoe_sglang.planner.placement import Placement
from elasticmoe_sglang.seats.membership import Membership


@dataclass(frozen=True, kw_only=True)
class ScaleTo:
    """Wish for a number of occupied seats."""

    size: int


@dataclass(frozen=True, kw_only=True)
class RetireSeats:
    """Wish for these seats to leave."""

    seats: tuple[int, ...]


Wish = ScaleTo | RetireSeats


@dataclass(frozen=True, kw_only=True)
class ColumnMove:
    """Expert column `column` goes from seat `source` to seat `target`."""

    column: int
    source: int
    target: int


@dataclass(frozen=True, kw_only=True)
class ScalePlan:
    """One change of membership and placement.

    Attributes:
        before, after: the membership; after.epoch is before.epoch + 1, unless nothing changes (`is_noop`).
        joining, leaving, survivors: seats, ascending.
        moves: ascending by column.
        placement_before, placement_after: owners of all columns.
    """

    before: Membership
    after: Membership
    joining: tuple[int, ...]
    leaving: tuple[int, ...]
    survivors: tuple[int, ...]
    moves: tuple[ColumnMove, ...]
    placement_before: Placement
    placement_after: Placement

    @property
    def is_noop(self) -> bool:
        """The wish is fulfilled already: nobody joins or leaves and no column moves."""
        return not (self.joining or self.leaving or self.moves)

    def incoming(self, seat: int) -> tuple[ColumnMove, ...]:
        """The moves that end on `seat`."""
        return tuple(move for move in self.moves if move.target == seat)

    def outgoing(self, seat: int) -> tuple[ColumnMove, ...]:
        """The moves that start from `seat`."""
        return tuple(move for move in self.moves if move.source == seat)


def plan_scale(membership: Membership, placement: Placement, wish: Wish) -> ScalePlan:
    """The change that fulfils `wish`.

    Growing takes the lowest empty seats, shrinking by size retires the highest ones, seat 0 never leaves. A column
    moves only if its seat leaves or holds more than its share, so the number of moves is the smallest that any
    balanced placement over the new seats needs. The same arguments give the same plan.

    Raises:
        PlanError: the wish does not lead to a legal membership; the text says what is allowed.
    """
    seats = _seats_after(membership, wish)
    moves = _fewest_moves(placement, seats)
    owners = list(placement.owners)
    for move in moves:
        owners[move.column] = move.target
    old, new = set(membership.seats), set(seats)
    changed = bool(moves) or old != new
    return ScalePlan(
        before=membership,
        after=Membership(seats=seats, epoch=membership.epoch + changed, capacity=membership.capacity),
        joining=tuple(sorted(new - old)),
        leaving=tuple(sorted(old - new)),
        survivors=tuple(sorted(old & new)),
        moves=moves,
        placement_before=placement,
        placement_after=Placement(owners=tuple(owners)),
    )


def _seats_after(membership: Membership, wish: Wish) -> tuple[int, ...]:
    if isinstance(wish, ScaleTo):
        return _seats_for_size(membership, wish.size)
    return _seats_without(membership, wish.seats)


def _seats_for_size(membership: Membership, size: int) -> tuple[int, ...]:
    if not 1 <= size <= membership.capacity:
        raise PlanError(
            f"the EP size {size} is not possible on this server",
            hint=f"It has {_count(membership.capacity, 'seat')}: ask for a size from 1 to {membership.capacity}",
        )
    if size <= len(membership.seats):
        return membership.seats[:size]
    empty = [seat for seat in range(membership.capacity) if seat not in membership.seats]
    return tuple(sorted((*membership.seats, *empty[: size - len(membership.seats)])))


def _seats_without(membership: Membership, retired: tuple[int, ...]) -> tuple[int, ...]:
    if not retired:
        raise PlanError("no seat to retire was named", hint=_retirable(membership))
    if len(set(retired)) != len(retired):
        raise PlanError(f"a seat is named twice in {list(retired)}", hint="Name each seat to retire once")
    if 0 in retired:
        raise PlanError("seat 0 cannot be retired, it leads the others", hint=_retirable(membership))
    absent = sorted(set(retired) - set(membership.seats))
    if absent:
        listed = ", ".join(map(str, absent))
        plural, verb = ("", "is") if len(absent) == 1 else ("s", "are")
        raise PlanError(f"seat{plural} {listed} {verb} not occupied", hint=_retirable(membership))
    return tuple(seat for seat in membership.seats if seat not in retired)


def _retirable(membership: Membership) -> str:
    others = ", ".join(str(seat) for seat in membership.seats if seat != 0)
    if not others:
        return "Only seat 0 is occupied, so none can be retired now"
    return f"Seats that can be retired now: {others}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _fewest_moves(placement: Placement, seats: tuple[int, ...]) -> tuple[ColumnMove, ...]:
    """Moves to a balanced placement over `seats` (ascending), as few as there can be, ascending by column.

    With n columns over k seats, n mod k seats hold one column more than n // k. Giving these odd columns to seats that
    hold more than n // k anyway keeps one more column where it is each time, and nothing else can save a move.
    """
    share, odd = divmod(placement.num_columns, len(seats))
    held = {seat: placement.columns_of(seat) for seat in seats}
    by_need = sorted(seats, key=lambda seat: (len(held[seat]) <= share, seat))
    quota = {seat: share + (rank < odd) for rank, seat in enumerate(by_need)}

    kept = {column for seat in seats for column in held[seat][: quota[seat]]}
    surplus: dict[int, list[int]] = {}
    for column, owner in enumerate(placement.owners):
        if column not in kept:
            surplus.setdefault(owner, []).append(column)
    wanting = {seat: quota[seat] - len(held[seat]) for seat in seats if quota[seat] > len(held[seat])}
    # Round robin on both sides: every receiver pulls from many sources, so that no single link carries it all.
    targets = _take_turns([seat] * need for seat, need in wanting.items())
    pairs = zip(_take_turns(surplus.values()), targets, strict=True)
    moves = [ColumnMove(column=column, source=placement.owners[column], target=target) for column, target in pairs]
    return tuple(sorted(moves, key=lambda move: move.column))


def _take_turns(rows: Iterable[list[int]]) -> Iterator[int]:
    """The first of every row, then the second of every row, and so on until all rows are used up."""
    lists = list(rows)
    for index in range(max(map(len, lists), default=0)):
        for row in lists:
            if index < len(row):
                yield row[index]
