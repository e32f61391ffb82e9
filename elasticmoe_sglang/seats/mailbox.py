"""Point-to-point messages between two seats of a group.

Every ordered pair of seats has one box in the shared region: a line of words and `BOX_BYTES` of room. A message goes
through it in pieces; a message of at most one piece is sent as soon as it lies in an empty box, as with gloo's eager
sends, so two seats that both send first do not block each other. Messages of a pair arrive in the order they were
sent; their tags must match in that order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elasticmoe_sglang.errors import CollectiveError, CollectiveMismatch, PeerDied, PeerTimeout, SeatAbsent
from elasticmoe_sglang.seats import futex
from elasticmoe_sglang.seats.channel import EPOCH_SHIFT, POLL_S
from elasticmoe_sglang.seats.control import PAGE_BYTES, SharedRegion, process_start_time
from elasticmoe_sglang.seats.copying import copy_bytes
from elasticmoe_sglang.seats.header import describe_header

if TYPE_CHECKING:
    from elasticmoe_sglang.seats.fabric import Fabric

BOX_BYTES = 64 << 10
_LINE_WORDS = 8
_POSTED, _HEADER, _TAG, _CONSUMED = 0, 1, 2, 4
_COUNT_MASK = (1 << EPOCH_SHIFT) - 1
_SPIN_S = 10e-6


def _words_bytes(capacity: int) -> int:
    # A line a pair, then a line a seat for its bell.
    words = _LINE_WORDS * capacity * (capacity + 1)
    return -(-words * 8 // PAGE_BYTES) * PAGE_BYTES


def boxes_bytes(capacity: int) -> int:
    """Bytes of one channel's boxes, words included."""
    return _words_bytes(capacity) + capacity * capacity * BOX_BYTES


@dataclass(kw_only=True)
class Transfer:
    """One message under way. `address` and `nbytes` name the caller's memory, which `keep` keeps alive."""

    peer: int | None
    address: int
    nbytes: int
    header: int
    tag: int
    keep: object
    moved: int = 0
    done: bool = False
    on_done: Callable[[], None] | None = field(default=None)


class Mailbox:
    """A seat's end of the boxes of one channel. Peers are seats, not group ranks."""

    def __init__(self, fabric: Fabric, index: int, offset: int) -> None:
        capacity = fabric.capacity
        self.index = index
        self._fabric = fabric
        self._me = fabric.me
        self._capacity = capacity
        self._words = fabric.region.words(offset, _words_bytes(capacity))
        self._bells_address = fabric.region.address + offset + 8 * _LINE_WORDS * capacity * capacity
        self._boxes_address = fabric.region.address + offset + _words_bytes(capacity)
        self._members: tuple[int, ...] = ()
        self._epoch = -1
        self._posted: dict[int, int] = {}
        self._consumed: dict[int, int] = {}
        self._sends: dict[int, deque[Transfer]] = {}
        self._receives: dict[int, deque[Transfer]] = {}
        self._receives_any: deque[Transfer] = deque()
        self._failure: CollectiveError | None = None

    @staticmethod
    def format(region: SharedRegion, offset: int, capacity: int) -> None:
        """Empty all boxes."""
        region.view[offset : offset + _words_bytes(capacity)] = bytes(_words_bytes(capacity))

    def enter(self, seats: tuple[int, ...], epoch: int) -> None:
        """Begin an epoch: counts restart, transfers that were not finished are forgotten."""
        if epoch == self._epoch:
            return
        self._members, self._epoch, self._failure = seats, epoch, None
        peers = [seat for seat in seats if seat != self._me]
        self._posted = dict.fromkeys(peers, 0)
        self._consumed = dict.fromkeys(peers, 0)
        self._sends = {seat: deque() for seat in peers}
        self._receives = {seat: deque() for seat in peers}
        self._receives_any = deque()

    def send(self, transfer: Transfer) -> None:
        """Start sending to `transfer.peer`."""
        self._check(transfer)
        assert transfer.peer is not None
        self._sends[transfer.peer].append(transfer)
        self._progress()

    def receive(self, transfer: Transfer) -> None:
        """Start receiving from `transfer.peer`; None takes the next message from anybody and sets it."""
        self._check(transfer)
        if transfer.peer is None:
            self._receives_any.append(transfer)
        else:
            self._receives[transfer.peer].append(transfer)
        self._progress()

    def wait(self, transfer: Transfer, timeout_s: float) -> None:
        """Drive all transfers until this one is done.

        Raises:
            PeerDied, PeerTimeout, CollectiveMismatch
        """
        started = next_check = time.monotonic()
        while not transfer.done:
            if self._failure is not None:
                raise self._failure
            bell = self._words[_LINE_WORDS * (self._capacity * self._capacity + self._me)] & 0xFFFFFFFF
            futex.full_fence()
            if self._progress() or transfer.done:
                continue
            if time.monotonic() - started > _SPIN_S:
                futex.wait(self._bell_address(self._me), bell, POLL_S)
            now = time.monotonic()
            if now >= next_check + POLL_S:
                next_check = now
                self._look_up(transfer, now - started, timeout_s)

    def _check(self, transfer: Transfer) -> None:
        if self._failure is not None:
            raise self._failure
        if transfer.peer is not None and transfer.peer not in self._posted:
            raise SeatAbsent(
                f"seat {transfer.peer} is not among {self._members}",
                seat=transfer.peer,
                epoch=self._epoch,
                operation=describe_header(transfer.header),
            )

    def _line(self, source: int, target: int) -> int:
        return _LINE_WORDS * (source * self._capacity + target)

    def _box(self, source: int, target: int) -> int:
        return self._boxes_address + BOX_BYTES * (source * self._capacity + target)

    def _bell_address(self, seat: int) -> int:
        return self._bells_address + 8 * _LINE_WORDS * seat

    def _count(self, word: int) -> int:
        return word & _COUNT_MASK if word >> EPOCH_SHIFT == self._epoch else 0

    def _progress(self) -> bool:
        moved = False
        for peer, queue in self._sends.items():
            while queue and self._send_piece(peer, queue[0]):
                moved = True
                if queue[0].done:
                    queue.popleft()
        for peer, queue in self._receives.items():
            while queue and self._receive_piece(peer, queue[0]):
                moved = True
                if queue[0].done:
                    queue.popleft()
        while self._receives_any and self._receive_any(self._receives_any[0]):
            moved = True
            if self._receives_any[0].done:
                self._receives_any.popleft()
        return moved

    def _send_piece(self, peer: int, transfer: Transfer) -> bool:
        line = self._line(self._me, peer)
        words, posted = self._words, self._posted[peer]
        if self._count(words[line + _CONSUMED]) != posted:
            return False
        piece = min(BOX_BYTES, transfer.nbytes - transfer.moved)
        copy_bytes(self._box(self._me, peer), transfer.address + transfer.moved, piece)
        words[line + _HEADER] = transfer.header
        words[line + _TAG] = transfer.tag
        futex.order_stores()
        self._posted[peer] = posted + 1
        words[line + _POSTED] = self._epoch << EPOCH_SHIFT | posted + 1
        self._finish_piece(peer, transfer, piece)
        return True

    def _receive_piece(self, peer: int, transfer: Transfer) -> bool:
        line = self._line(peer, self._me)
        words, consumed = self._words, self._consumed[peer]
        if self._count(words[line + _POSTED]) != consumed + 1:
            return False
        futex.order_stores()
        theirs = words[line + _HEADER], words[line + _TAG]
        if theirs != (transfer.header, transfer.tag):
            self._failure = CollectiveMismatch(
                f"seat {peer} sent {describe_header(theirs[0])} with tag {theirs[1]}, "
                f"seat {self._me} expected {describe_header(transfer.header)} with tag {transfer.tag}",
                seat=peer,
                epoch=self._epoch,
                operation=f"recv on channel {self.index}",
            )
            raise self._failure
        piece = min(BOX_BYTES, transfer.nbytes - transfer.moved)
        copy_bytes(transfer.address + transfer.moved, self._box(peer, self._me), piece)
        futex.order_stores()
        self._consumed[peer] = consumed + 1
        words[line + _CONSUMED] = self._epoch << EPOCH_SHIFT | consumed + 1
        self._finish_piece(peer, transfer, piece)
        return True

    def _receive_any(self, transfer: Transfer) -> bool:
        sources = [transfer.peer] if transfer.peer is not None else [p for p, q in self._receives.items() if not q]
        for peer in sources:
            if self._receive_piece(peer, transfer):
                transfer.peer = peer
                return True
        return False

    def _finish_piece(self, peer: int, transfer: Transfer, piece: int) -> None:
        transfer.moved += piece
        if transfer.moved >= transfer.nbytes:
            transfer.done = True
            if transfer.on_done is not None:
                transfer.on_done()
        futex.add_one_and_wake(self._bell_address(peer))

    def _look_up(self, transfer: Transfer, waited_s: float, timeout_s: float) -> None:
        peers = [transfer.peer] if transfer.peer is not None else list(self._receives)
        where = f"{describe_header(transfer.header)} on channel {self.index}"
        dead = []
        for peer in peers:
            pid, start = self._fabric.control.identity(peer)
            if pid and process_start_time(pid) != start:
                dead.append(peer)
        if peers and len(dead) == len(peers):
            self._failure = PeerDied(
                f"the process of seat {dead[0]} is gone", seat=dead[0], epoch=self._epoch, operation=where
            )
        elif waited_s >= timeout_s:
            self._failure = PeerTimeout(
                f"seats {peers} did not answer within {timeout_s:g} s",
                seat=peers[0] if peers else None,
                epoch=self._epoch,
                operation=where,
            )
        if self._failure is not None:
            raise self._failure
