"""The layout of the ranks' windows, and what a rank's kernels know about them.

Every rank owns one window of device memory, mapped by all its peers. In each rank's address space window r lies at
`base + r * pitch`, reserved for all ranks from the start, so no address changes when ranks come and go:

    flags     [channels][blocks][capacity] int64   each peer's last step: written by the peers, read by the owner
    headers   [channels][2][capacity] int64        the collective that each peer called, by parity of the step
    data      [channels][2][data_bytes]            written by the owner, read by the peers, by parity of the step

Beside it a rank has a control block of its own (`int64` words in device memory): epoch, members, deadline, step
counters. The host rewrites it between two launches; captured graphs read it anew at every replay. Two words of host
memory belong to it: in one a kernel says why it gave up; in the other the host tells kernels that wait to give up.
"""

from __future__ import annotations

from dataclasses import dataclass

EPOCH_SHIFT = 40
"""A flag is `epoch << 40 | step`; steps start again with every epoch."""
POISON_STEP = (1 << EPOCH_SHIFT) - 2
"""The step that a rank announces once it has given up: later than any real one. One more: because of a mismatch."""

# Words of the control block. MEMBERS has bit i set for a present rank i; FAILED is the epoch that failed, plus one;
# ERROR_ADDRESS and STOP_ADDRESS are words of host memory; a clock a block; then the step counters.
EPOCH, MEMBERS, DEADLINE_NS, FAILED, ERROR_ADDRESS, STOP_ADDRESS, CLOCKS, COUNTERS = 0, 1, 2, 3, 4, 5, 8, 72
MAX_BLOCKS = COUNTERS - CLOCKS

TIMED_OUT, TOLD, MISMATCHED, TOLD_OF_MISMATCH = 1, 2, 3, 4
"""Kinds of failure in an error word."""

_DATA_ALIGNMENT = 4096


@dataclass(frozen=True, kw_only=True)
class WindowLayout:
    """Sizes that all ranks share.

    capacity: ranks; channels: independent sequences of collectives; data_bytes: largest message of one launch;
    blocks: programs of every launch. A program that waits keeps its place on a multiprocessor, so the programs of all
    ranks of a device must find room beside each other.
    """

    capacity: int
    channels: int = 2
    data_bytes: int = 8 << 20
    blocks: int = 32

    def __post_init__(self) -> None:
        assert 1 <= self.capacity <= 64 and self.channels >= 1 and 1 <= self.blocks <= MAX_BLOCKS
        assert self.data_bytes > 0 and self.data_bytes % _DATA_ALIGNMENT == 0

    @property
    def headers_offset(self) -> int:
        return self.channels * self.blocks * self.capacity * 8

    @property
    def data_offset(self) -> int:
        end = self.headers_offset + self.channels * 2 * self.capacity * 8
        return -(-end // _DATA_ALIGNMENT) * _DATA_ALIGNMENT

    @property
    def window_bytes(self) -> int:
        """Of one rank's window."""
        return self.data_offset + self.channels * 2 * self.data_bytes

    @property
    def control_words(self) -> int:
        """Length of the control block."""
        return COUNTERS + self.channels * self.blocks


@dataclass(frozen=True, kw_only=True)
class Windows:
    """What one rank's launches need.

    layout: of all windows; base, pitch: window r is at base + r * pitch; control: address of the control block;
    rank: my global rank.
    """

    layout: WindowLayout
    base: int
    pitch: int
    control: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An error word, read.

    kind: TIMED_OUT (`rank` did not come in time), MISMATCHED (`rank` is in another collective), TOLD or
    TOLD_OF_MISMATCH (`rank` has given up because of the one or the other, which it found itself or learned from a third
    rank); step: of the channel, in the epoch that was current.
    """

    kind: int
    rank: int
    channel: int
    operation: int
    step: int

    @classmethod
    def unpack(cls, word: int) -> Failure | None:
        """None for the word of a rank that never failed."""
        word &= (1 << 64) - 1
        if not word:
            return None
        return cls(
            kind=word >> 56,
            rank=word >> 48 & 0xFF,
            channel=word >> 44 & 0xF,
            operation=word >> 40 & 0xF,
            step=word & ((1 << EPOCH_SHIFT) - 1),
        )
