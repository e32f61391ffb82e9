"""Point-to-point messages between two ranks of a group.

Every ordered pair of ranks has one box in the shared region: a line of words and `BOX_BYTES` of room. A message goes
through it in pieces; a message of at most one piece is sent as soon as it lies in an empty box, as with gloo's eager
sends, so two ranks that both send first do not block each other. Messages of a pair arrive in the order they were
sent; their tags must match in that order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elasticmoe_sglang.comm import futex
from elasticmoe_sglang.comm.channel import EPOCH_SHIFT, POLL_S
from elasticmoe_sglang.comm.control_page import PAGE_BYTES, SharedMemory, process_start_time
from elasticmoe_sglang.comm.copying import copy_bytes
from elasticmoe_sglang.comm.header import describe_header
from elasticmoe_sglang.errors import CollectiveError, CollectiveMismatch, PeerDied, PeerTimeout, RankInactive

if TYPE_CHECKING:
    from elasticmoe_sglang.comm.region import CollectiveRegion

BOX_BYTES = 64 << 10
_LINE_WORDS = 8
_POSTED, _HEADER, _TAG, _CONSUMED = 0, 1, 2, 4
_COUNT_MASK = (1 << EPOCH_SHIFT) - 1
_SPIN_S = 10e-6


def _words_bytes(capacity: int) -> int:
    # A line a pair, then a line a rank for its bell.
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
    """A rank's end of the boxes of one channel. Peers are ranks, not group ranks."""

    def __init__(self, region: CollectiveRegion, index: int, offset: int) -> None:
        capacity = region.capacity
        self.index = index
        self._region = region
        self._rank = region.rank
        self._capacity = capacity
        self._words = region.shared.words(offset, _words_bytes(capacity))
        self._bells_address = region.shared.address + offset + 8 * _LINE_WORDS * capacity * capacity
        self._boxes_address = region.shared.address + offset + _words_bytes(capacity)
        self._members: tuple[int, ...] = ()
        self._epoch = -1
        self._posted: dict[int, int] = {}
        self._consumed: dict[int, int] = {}
        self._sends: dict[int, deque[Transfer]] = {}
        self._receives: dict[int, deque[Transfer]] = {}
        self._receives_any: deque[Transfer] = deque()
        self._failure: CollectiveError | None = None

    @staticmethod
    def format(shared: SharedMemory, offset: int, capacity: int) -> None:
        """Empty all boxes."""
        shared.view[offset : offset + _words_bytes(capacity)] = bytes(_words_bytes(capacity))

    def enter(self, ranks: tuple[int, ...], epoch: int) -> None:
        """Begin an epoch: counts restart, transfers that were not finished are forgotten."""
        if epoch == self._epoch:
            return
        self._members, self._epoch, self._failure = ranks, epoch, None
        peers = [rank for rank in ranks if rank != self._rank]
        self._posted = dict.fromkeys(peers, 0)
        self._consumed = dict.fromkeys(peers, 0)
        self._sends = {rank: deque() for rank in peers}
        self._receives = {rank: deque() for rank in peers}
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
            bell = self._words[_LINE_WORDS * (self._capacity * self._capacity + self._rank)] & 0xFFFFFFFF
            futex.full_fence()
            if self._progress() or transfer.done:
                continue
            if time.monotonic() - started > _SPIN_S:
                futex.wait(self._bell_address(self._rank), bell, POLL_S)
            now = time.monotonic()
            if now >= next_check + POLL_S:
                next_check = now
                self._look_up(transfer, now - started, timeout_s)

    def _check(self, transfer: Transfer) -> None:
        if self._failure is not None:
            raise self._failure
        if transfer.peer is not None and transfer.peer not in self._posted:
            raise RankInactive(
                f"rank {transfer.peer} is not among {self._members}",
                rank=transfer.peer,
                epoch=self._epoch,
                operation=describe_header(transfer.header),
            )

    def _line(self, source: int, target: int) -> int:
        return _LINE_WORDS * (source * self._capacity + target)

    def _box(self, source: int, target: int) -> int:
        return self._boxes_address + BOX_BYTES * (source * self._capacity + target)

    def _bell_address(self, rank: int) -> int:
        return self._bells_address + 8 * _LINE_WORDS * rank

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
        line = self._line(self._rank, peer)
        words, posted = self._words, self._posted[peer]
        if self._count(words[line + _CONSUMED]) != posted:
            return False
        piece = min(BOX_BYTES, transfer.nbytes - transfer.moved)
        copy_bytes(self._box(self._rank, peer), transfer.address + transfer.moved, piece)
        words[line + _HEADER] = transfer.header
        words[line + _TAG] = transfer.tag
        futex.order_stores()
        self._posted[peer] = posted + 1
        words[line + _POSTED] = self._epoch << EPOCH_SHIFT | posted + 1
        self._finish_piece(peer, transfer, piece)
        return True

    def _receive_piece(self, peer: int, transfer: Transfer) -> bool:
        line = self._line(peer, self._rank)
        words, consumed = self._words, self._consumed[peer]
        if self._count(words[line + _POSTED]) != consumed + 1:
            return False
        futex.order_stores()
        theirs = words[line + _HEADER], words[line + _TAG]
        if theirs != (transfer.header, transfer.tag):
            self._failure = CollectiveMismatch(
                f"rank {peer} sent {describe_header(theirs[0])} with tag {theirs[1]}, "
                f"rank {self._rank} expected {describe_header(transfer.header)} with tag {transfer.tag}",
                rank=peer,
                epoch=self._epoch,
                operation=f"recv on channel {self.index}",
            )
            raise self._failure
        piece = min(BOX_BYTES, transfer.nbytes - transfer.moved)
        copy_bytes(transfer.address + transfer.moved, self._box(peer, self._rank), piece)
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
            pid, start = self._region.control.identity(peer)
            if pid and process_start_time(pid) != start:
                dead.append(peer)
        if peers and len(dead) == len(peers):
            self._failure = PeerDied(
                f"the process of rank {dead[0]} is gone", rank=dead[0], epoch=self._epoch, operation=where
            )
        elif waited_s >= timeout_s:
            self._failure = PeerTimeout(
                f"ranks {peers} did not answer within {timeout_s:g} s",
                rank=peers[0] if peers else None,
                epoch=self._epoch,
                operation=where,
            )
        if self._failure is not None:
            raise self._failure
