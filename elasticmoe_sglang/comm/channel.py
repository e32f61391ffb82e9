"""One channel: the shared windows through which the ranks of one process group exchange data.

Each rank owns a line of words (arrival token, two headers) and two data windows. A step of a collective is: copy into
my window, write the header, write the arrival token, wait until every member arrived, read the members' windows. The
windows alternate, so one wait a step is enough: a rank that writes window p again at step n+2 has passed step n+1, at
which every member had finished reading step n.

Tokens are `epoch << 40 | step`; steps restart at every epoch, so a joining rank has nothing to catch up with.

Waiting: poll for a few microseconds, then sleep on the channel's release word. The member that finds all arrived sets
that word and wakes the sleepers. Sleepers check every 50 ms for dead peers, the deadline and the poison word, by which
a rank that gave up tells the others why.

In the region a channel is its words (`lines_bytes`), then two windows for each rank.
"""

from __future__ import annotations

import os
import time

from elasticmoe_sglang.comm import futex
from elasticmoe_sglang.comm.control_page import PAGE_BYTES, ControlPage, process_start_time
from elasticmoe_sglang.comm.header import describe_header
from elasticmoe_sglang.errors import CollectiveError, CollectiveMismatch, PeerDied, PeerTimeout

EPOCH_SHIFT = 40
POLL_S = 0.05
"""How often a sleeper checks for dead peers and its deadline."""

_LINE_WORDS = 8
_ARRIVAL, _HEADER = 0, 2
_POISON_WORD, _RELEASE_WORD, _LINES_WORD = 0, 8, 16
_DIED, _TIMED_OUT, _MISMATCHED = 1, 2, 3
_POISON_ERRORS: dict[int, tuple[type[CollectiveError], str]] = {
    _DIED: (PeerDied, "the process of a rank is gone"),
    _TIMED_OUT: (PeerTimeout, "the others gave up waiting for a rank"),
    _MISMATCHED: (CollectiveMismatch, "ranks called different collectives"),
}
_HINT = "The group works again after the next membership."
# With more members than cores, polling longer only keeps a peer from running.
_SPIN_S = 30e-6
_SPIN_CROWDED_S = 4e-6


def lines_bytes(capacity: int) -> int:
    """Bytes of a channel's words, whole pages."""
    words = _LINES_WORD + _LINE_WORDS * capacity
    return -(-words * 8 // PAGE_BYTES) * PAGE_BYTES


def channel_bytes(capacity: int, window_bytes: int) -> int:
    """Bytes of a whole channel: its words and its windows."""
    return lines_bytes(capacity) + 2 * capacity * window_bytes


class Channel:
    """A rank's end of one channel.

    Args:
        control: the control page of the region that the channel lies in.
        rank: this process's rank.
        index: number of the channel, for messages.
        offset: byte offset of the channel in the region.
    """

    def __init__(self, control: ControlPage, rank: int, index: int, offset: int) -> None:
        shared, capacity = control.shared, control.capacity
        self.index = index
        self.window_bytes = control.window_bytes
        self.step = 0
        """Steps since the epoch began; its lowest bit says which windows the last step used."""
        self._control = control
        self._rank = rank
        self._words = shared.words(offset, lines_bytes(capacity))
        self._release_address = shared.address + offset + 8 * _RELEASE_WORD
        self._windows_offset = offset + lines_bytes(capacity)
        self._region_address = shared.address
        self._line = _LINES_WORD + _LINE_WORDS * rank
        self._peers: tuple[int, ...] = ()
        self._identities: dict[int, tuple[int, int]] = {}
        self._arrivals: tuple[int, ...] = ()
        self._epoch = -1
        self._base = 0
        self._mark_salt = 0
        self._cores = len(os.sched_getaffinity(0))
        self._crowded = False
        self._failure: CollectiveError | None = None

    def enter(self, ranks: tuple[int, ...], epoch: int) -> None:
        """Begin an epoch with these members (this rank among them). Steps restart, an earlier failure is forgotten."""
        assert self._rank in ranks
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._base = epoch << EPOCH_SHIFT
        self._mark_salt = epoch * 0x9E3779B1  # so that step n of one epoch and of the next leave different marks
        self.step = 0
        self._peers = tuple(rank for rank in ranks if rank != self._rank)
        self._arrivals = tuple(_LINES_WORD + _LINE_WORDS * rank + _ARRIVAL for rank in self._peers)
        self._identities = {}
        self._crowded = len(ranks) > self._cores
        self._failure = None
        self._note_identities()

    def window_offset(self, rank: int, parity: int) -> int:
        """Byte offset in the region of one of a rank's two windows."""
        return self._windows_offset + (2 * rank + parity) * self.window_bytes

    def window_address(self, rank: int, parity: int) -> int:
        return self._region_address + self.window_offset(rank, parity)

    @property
    def next_parity(self) -> int:
        """Which windows the next step uses."""
        return (self.step + 1) & 1

    def meet(self, header: int, timeout_s: float) -> None:
        """Announce that my window for this step is written, and wait until every member's is.

        Args:
            header: packed description of the collective (`header.pack_header`); must be equal on all members.
            timeout_s: how long a member may be late.

        Raises:
            PeerDied, PeerTimeout, CollectiveMismatch: also on every later call until the next epoch.
        """
        words = self._words
        poison = words[_POISON_WORD]
        if self._failure is not None or poison:
            self._refuse(poison, header)
        self.step = step = self.step + 1
        token = self._base + step
        line = self._line
        words[line + _HEADER + (step & 1)] = header
        futex.order_stores()
        words[line + _ARRIVAL] = token
        if self._all_arrived(token, header):
            self._release(token)
        else:
            self._wait(token, header, timeout_s)
        futex.order_stores()
        wanted = _HEADER + (step & 1) - _ARRIVAL
        for arrival in self._arrivals:
            if words[arrival + wanted] != header:
                self._mismatch(arrival, words[arrival + wanted], header)

    def _all_arrived(self, token: int, header: int) -> bool:
        words = self._words
        for arrival in self._arrivals:
            ahead = words[arrival] - token
            if ahead < 0:
                return False
            if ahead > 1:
                # A member can be one step ahead at most, as it needs our next arrival.
                self._left_behind(arrival, header)
        return True

    def _release(self, token: int) -> None:
        words = self._words
        mark = (token + self._mark_salt) & 0xFFFFFFFF
        if words[_RELEASE_WORD] != mark:
            words[_RELEASE_WORD] = mark
            futex.wake(self._release_address)

    def _wait(self, token: int, header: int, timeout_s: float) -> None:
        clock = time.perf_counter
        crowded = self._crowded
        until = clock() + (_SPIN_CROWDED_S if crowded else _SPIN_S)
        while clock() < until:
            if crowded:
                os.sched_yield()
            if self._all_arrived(token, header):
                self._release(token)
                return
        started = next_check = time.monotonic()
        next_check += POLL_S
        while True:
            seen = self._words[_RELEASE_WORD]
            # Our arrival must be visible before we read the others' once more: of any two members one then sees the
            # other's arrival, so the last to arrive never sleeps and wakes the rest.
            futex.full_fence()
            if self._all_arrived(token, header):
                self._release(token)
                return
            futex.wait(self._release_address, seen & 0xFFFFFFFF, POLL_S)
            now = time.monotonic()
            if now >= next_check:
                next_check = now + POLL_S
                self._check_peers(token, header, now - started, timeout_s)

    # What goes wrong. Everything below is off the fast path.

    def _check_peers(self, token: int, header: int, waited_s: float, timeout_s: float) -> None:
        poison = self._words[_POISON_WORD]
        if poison:
            self._refuse(poison, header)
        self._note_identities()
        missing = [rank for rank, word in zip(self._peers, self._arrivals, strict=True) if self._words[word] < token]
        for rank in missing:
            known = self._identities.get(rank)
            if known is None:
                continue  # no process has registered yet: a rank that starts late
            # The process that served the rank when the epoch began; a new one that serves it now is not that.
            gone = process_start_time(known[0]) != known[1]
            # It may have arrived and then died, while we slept.
            if gone and self._words[_LINES_WORD + _LINE_WORDS * rank + _ARRIVAL] < token:
                self._fail(_DIED, rank, header, f"the process of rank {rank} (pid {known[0]}) is gone")
        if missing and waited_s >= timeout_s:
            self._fail(_TIMED_OUT, missing[0], header, f"ranks {missing} did not arrive within {timeout_s:g} s")

    def _note_identities(self) -> None:
        for rank in self._peers:
            if rank not in self._identities:
                identity = self._control.identity(rank)
                if identity[0]:
                    self._identities[rank] = identity

    def _mismatch(self, arrival: int, theirs: int, mine: int) -> None:
        rank = (arrival - _LINES_WORD) // _LINE_WORDS
        text = f"rank {rank} called {describe_header(theirs)}, rank {self._rank} called {describe_header(mine)}"
        self._fail(_MISMATCHED, rank, mine, text)

    def _left_behind(self, arrival: int, header: int) -> None:
        rank = (arrival - _LINES_WORD) // _LINE_WORDS
        token = self._words[arrival]
        text = (
            f"rank {rank} is at epoch {token >> EPOCH_SHIFT}, step {token & ((1 << EPOCH_SHIFT) - 1)}; "
            f"rank {self._rank} is at epoch {self._epoch}, step {self.step}"
        )
        self._fail(_MISMATCHED, rank, header, text)

    def _fail(self, code: int, rank: int, header: int, text: str) -> None:
        # The epoch is part of the word, so that members of another epoch ignore it.
        self._words[_POISON_WORD] = (self._epoch + 1) << 16 | code << 8 | rank
        futex.wake(self._release_address)
        self._failure = _POISON_ERRORS[code][0](
            text, rank=rank, epoch=self._epoch, operation=self._operation(header), hint=_HINT
        )
        raise self._failure

    def _refuse(self, poison: int, header: int) -> None:
        if self._failure is not None:
            first = self._failure
            raise type(first)(
                f"the group failed earlier in this epoch: {first.what}",
                rank=first.rank,
                epoch=self._epoch,
                operation=self._operation(header),
                hint=_HINT,
            )
        epoch = (poison >> 16) - 1
        if epoch != self._epoch:
            if epoch < self._epoch:
                self._words[_POISON_WORD] = 0  # left over from an epoch that is over
            return
        kind, text = _POISON_ERRORS[poison >> 8 & 0xFF]
        self._failure = kind(text, rank=poison & 0xFF, epoch=self._epoch, operation=self._operation(header), hint=_HINT)
        raise self._failure

    def _operation(self, header: int) -> str:
        return f"{describe_header(header)} on channel {self.index}"
