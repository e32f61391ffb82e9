"""The control page: the words at the start of the collective region that every process of the server may read.

It holds the committed view (membership and placement), the state of the commit barrier, and for each rank the worker
that serves it: its process, what it says about itself, its KV tokens, its window of device memory. The launcher writes
the first membership, the coordinator the placement that goes with it, and the commit barrier all later views; a worker
writes its own line.

All words are 64-bit, aligned, written whole; each has one writer at a time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from array import array
from dataclasses import dataclass
from enum import IntEnum

from elasticmoe_sglang.comm import futex
from elasticmoe_sglang.comm.membership import MAX_CAPACITY, Membership, mask_to_ranks
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.planner import Placement, View

PAGE_BYTES = 4096
CONTROL_BYTES = 8 * PAGE_BYTES

_MAGIC = 0x454C4153_4D4F4531
# Word offsets in the page. Words that different processes write often live in cache lines (8 words) of their own.
_W_MAGIC, _W_CAPACITY, _W_CHANNELS, _W_WINDOW = 0, 1, 2, 3
_W_VERSION, _W_SLOTS, _SLOT_WORDS = 8, 9, 4
BARRIER_WORD = 24
"""First of the 32 words that belong to the commit barrier."""
_W_RANKS, _RANK_WORDS = 64, 8
_W_OWNERS = 1024
MAX_COLUMNS = 4096
"""The most expert columns: the page holds the owners of two views, one byte each."""
MAX_COPIES = 2048
"""The most copies of expert columns: the page holds those of two views, a column and a rank in four bytes each."""
_COPY_BYTES = 4
_COPIES_AT = 8 * _W_OWNERS + 2 * MAX_COLUMNS
_PID, _START, _STATE = 0, 1, 3
BARRIER_ARRIVAL = 4
"""Word of a rank's line in which it arrives at the commit barrier."""
_KV_CAPACITY, _KV_USE = 6, 7
WINDOW_BLOCK = 5
"""Word of a rank's line that names its window of device memory: the HMM's block id plus one, 0 for none yet."""


class WorkerState(IntEnum):
    """The lifecycle of the worker that serves a rank; each writes its own state to the control page.

    STANDBY    no worker serves the rank; an idle process of the IMM waits
       | assigned
    STARTING   boots: builds the model, maps its memory
       | booted; the first ranks of a server on CPUs boot together and go on to ACTIVE
    JOINING    booted by itself, waits for the others
       | COMMIT
    ACTIVE     takes part in every batch, also after a commit that was aborted and after a recovery
       | COMMIT of a membership without it
    RETIRING   migrates its requests to the survivors
       | the process ends, here or in any other state
    STANDBY    (a worker that is killed leaves its last state behind: `ControlPage.alive` tells)

    HOT        booted, no member: from STARTING, or from RETIRING instead of ending; goes on to JOINING
    """

    STANDBY = 0
    STARTING = 1
    JOINING = 2
    ACTIVE = 3
    RETIRING = 4
    HOT = 5


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """The worker of one rank; pid 0 when none registered. `start_time`: of its process, in clock ticks since boot."""

    rank: int
    pid: int
    start_time: int
    state: WorkerState


class SharedMemory:
    """A shared mapping of a whole file: its words, its bytes, its address.

    Args:
        fd: any descriptor of the region; it is duplicated, so the caller may close it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)
        os.set_inheritable(self.fd, False)
        self.nbytes = os.fstat(self.fd).st_size
        self.memory = mmap.mmap(self.fd, self.nbytes)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def words(self, offset: int, nbytes: int) -> memoryview[int]:
        """64-bit unsigned words from a byte offset."""
        return self.view[offset : offset + nbytes].cast("Q")

    def close_fd(self) -> None:
        """Close the descriptor. The mapping goes when nothing refers to it any more."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def process_start_time(pid: int) -> int:
    """Start of a process in clock ticks since boot; 0 when it is gone or a zombie (read from /proc)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    state, start = fields[0], fields[19]
    return 0 if state in (b"Z", b"X") else int(start)


class ControlPage:
    """Read and write the control page.

    Args:
        shared: the region, formatted (`ControlPage.format`).

    Raises:
        UserInputError: the region was not formatted.
    """

    def __init__(self, shared: SharedMemory) -> None:
        self.shared = shared
        self.words = shared.words(0, CONTROL_BYTES)
        if self.words[_W_MAGIC] != _MAGIC:
            raise UserInputError(
                "the collective region has no control page", hint="Call CollectiveRegion.format on it first."
            )
        self.capacity = self.words[_W_CAPACITY]
        self.channels = self.words[_W_CHANNELS]
        self.window_bytes = self.words[_W_WINDOW]

    @staticmethod
    def format(shared: SharedMemory, *, capacity: int, channels: int, window_bytes: int) -> None:
        """Clear the page and write the geometry. Before any rank starts."""
        assert _W_RANKS + _RANK_WORDS * MAX_CAPACITY <= _W_OWNERS
        assert _W_SLOTS + 2 * _SLOT_WORDS <= BARRIER_WORD
        assert _COPIES_AT + 2 * _COPY_BYTES * MAX_COPIES <= CONTROL_BYTES
        shared.view[:CONTROL_BYTES] = bytes(CONTROL_BYTES)
        words = shared.words(0, CONTROL_BYTES)
        words[_W_CAPACITY], words[_W_CHANNELS], words[_W_WINDOW] = capacity, channels, window_bytes
        words[_W_MAGIC] = _MAGIC

    # The view. Two slots: the writer fills the one that is not current, then the version word makes it so.

    def publish(self, view: View) -> None:
        """Make `view` the committed one. At launch; from then on only the commit barrier does, under its lock."""
        self.stage_placement(view.placement)
        self.publish_staged(view.membership)

    def stage_placement(self, placement: Placement) -> None:
        """Write the placement of the next view.

        Raises:
            UserInputError: more expert columns, or more copies of them, than the page has room for.
        """
        owners, copies = placement.owners, placement.copies
        if len(owners) > MAX_COLUMNS:
            raise UserInputError(f"{len(owners)} expert columns are more than {MAX_COLUMNS}")
        if len(copies) > MAX_COPIES:
            raise UserInputError(f"{len(copies)} copies of expert columns are more than {MAX_COPIES}")
        slot = (self.words[_W_VERSION] + 1) % 2
        start = 8 * _W_OWNERS + MAX_COLUMNS * slot
        self.shared.view[start : start + len(owners)] = bytes(owners)
        packed = array("I", (column << 8 | rank for column, rank in copies)).tobytes()
        start = _COPIES_AT + _COPY_BYTES * MAX_COPIES * slot
        self.shared.view[start : start + len(packed)] = packed
        words = _W_SLOTS + _SLOT_WORDS * slot
        self.words[words + 2], self.words[words + 3] = len(owners), len(copies)

    def publish_staged(self, membership: Membership) -> None:
        """Make `membership`, with the placement that was staged last, the committed view."""
        version = self.words[_W_VERSION] + 1
        slot = _W_SLOTS + _SLOT_WORDS * (version % 2)
        self.words[slot], self.words[slot + 1] = membership.epoch, membership.mask
        futex.order_stores()
        self.words[_W_VERSION] = version

    @property
    def has_membership(self) -> bool:
        """Whether one was published since the region was formatted."""
        return self.words[_W_VERSION] != 0

    def read_membership(self) -> Membership:
        """The committed membership. Raises UserInputError: none was published yet."""
        return self._read()[0]

    def read_view(self) -> View:
        """The committed view.

        Raises:
            UserInputError: none was published yet.
        """
        membership, placement = self._read()
        return View(membership=membership, placement=placement)

    def _read(self) -> tuple[Membership, Placement]:
        while True:
            version = self.words[_W_VERSION]
            if version == 0:
                raise UserInputError("no membership was published yet")
            slot = version % 2
            words = _W_SLOTS + _SLOT_WORDS * slot
            epoch, mask, columns, copies = self.words[words : words + _SLOT_WORDS]
            start = 8 * _W_OWNERS + MAX_COLUMNS * slot
            owners = tuple(self.shared.view[start : start + columns])
            start = _COPIES_AT + _COPY_BYTES * MAX_COPIES * slot
            packed = array("I", self.shared.view[start : start + _COPY_BYTES * copies].tobytes())
            # The slot is rewritten two versions later at the earliest, and its placement is staged one version later.
            if self.words[_W_VERSION] == version:
                membership = Membership(ranks=mask_to_ranks(mask), epoch=epoch, capacity=self.capacity)
                return membership, Placement(owners=owners, copies=tuple((word >> 8, word & 0xFF) for word in packed))

    # Workers

    def rank_word(self, rank: int, which: int) -> int:
        """Index of a word of a rank's line."""
        assert 0 <= rank < self.capacity
        return _W_RANKS + _RANK_WORDS * rank + which

    def register_worker(self, rank: int, state: WorkerState = WorkerState.STARTING) -> None:
        """Say that this process is the worker of `rank`."""
        line = self.rank_word(rank, 0)
        pid = os.getpid()
        self.words[line + _PID] = 0
        self.words[line + _START] = process_start_time(pid)
        self.words[line + _STATE] = state
        self.words[line + BARRIER_ARRIVAL] = 0
        self.words[line + _KV_CAPACITY] = self.words[line + _KV_USE] = 0
        futex.order_stores()
        self.words[line + _PID] = pid

    def set_worker_state(self, rank: int, state: WorkerState) -> None:
        self.words[self.rank_word(rank, _STATE)] = state

    def set_kv(self, rank: int, *, capacity: int, used: int, cached: int) -> None:
        """Publish the rank's KV tokens: how many there are, are in use, are cached for later requests."""
        self.words[self.rank_word(rank, _KV_CAPACITY)] = capacity
        self.words[self.rank_word(rank, _KV_USE)] = used | cached << 32

    def kv(self, rank: int) -> tuple[int, int, int]:
        """(capacity, used, cached) in tokens; zeros until the rank has published them."""
        use = self.words[self.rank_word(rank, _KV_USE)]
        return self.words[self.rank_word(rank, _KV_CAPACITY)], use & 0xFFFFFFFF, use >> 32

    def worker(self, rank: int) -> WorkerInfo:
        line = self.rank_word(rank, 0)
        words = self.words
        return WorkerInfo(
            rank=rank,
            pid=words[line + _PID],
            start_time=words[line + _START],
            state=WorkerState(words[line + _STATE]),
        )

    def identity(self, rank: int) -> tuple[int, int]:
        """(pid, start time) of the rank's worker; pid 0 when none registered."""
        line = self.rank_word(rank, 0)
        return self.words[line + _PID], self.words[line + _START]

    def alive(self, rank: int) -> bool:
        """Whether the rank's worker is registered and runs."""
        pid, start = self.identity(rank)
        return pid != 0 and process_start_time(pid) == start
