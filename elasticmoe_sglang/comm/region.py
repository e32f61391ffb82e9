"""The shared region of the ranks and a process's view of it.

Layout: the control page, then one part per channel: its words, its windows (two a rank), its point-to-point boxes. The
region is a memfd that lives outside the ranks, so no rank's death takes it along. Pages that nobody touches cost
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from elasticmoe_sglang.comm import futex
from elasticmoe_sglang.comm.channel import Channel, lines_bytes
from elasticmoe_sglang.comm.control_page import CONTROL_BYTES, PAGE_BYTES, ControlPage, SharedMemory, WorkerState
from elasticmoe_sglang.comm.mailbox import Mailbox, boxes_bytes
from elasticmoe_sglang.comm.membership import MAX_CAPACITY, Membership
from elasticmoe_sglang.errors import UserInputError

DEFAULT_CHANNELS = 16
DEFAULT_WINDOW_BYTES = 1 << 20
_MAX_EPOCH = 1 << 22


def _channel_bytes(capacity: int, window_bytes: int) -> int:
    return lines_bytes(capacity) + 2 * capacity * window_bytes + boxes_bytes(capacity)


class CollectiveRegion:
    """One rank's view of the shared region: who takes part, and the channels to meet them.

    The view (`members`, `epoch`) changes only by `set_membership` and `solo`, never by what other processes do. A
    new CollectiveRegion is solo.

    Args:
        fd: descriptor of the region (duplicated). It must have been formatted: `CollectiveRegion.format(fd, ...)`.
        me: my rank.
        timeout_s: how long a member may be late in any collective; None leaves it to each group's own timeout.

    Raises:
        UserInputError: region not formatted, too small, or no such rank.
    """

    def __init__(self, fd: int, rank: int, *, timeout_s: float | None = None) -> None:
        if not futex.supported():
            raise UserInputError("no futex call is known for this machine's architecture")
        self.shared = SharedMemory(fd)
        self.control = ControlPage(self.shared)
        self.capacity = self.control.capacity
        self.window_bytes = self.control.window_bytes
        if not 0 <= rank < self.capacity:
            raise UserInputError(f"rank {rank} does not exist among {self.capacity} ranks")
        self.rank = rank
        self.timeout_s = math.inf if timeout_s is None else timeout_s
        self._channels: dict[int, Channel] = {}
        self._mailboxes: dict[int, Mailbox] = {}
        self._free_channels = list(range(self.control.channels))
        self._members: tuple[int, ...] = (rank,)
        self._epoch = 0
        self._adopted_epoch = -1
        self.version = 0
        """Grows whenever the view changes; groups compare it to notice."""
        self.listeners: list[Callable[[], None]] = []
        """Called after every change of the view, in the thread that changed it."""
        self.group_type: Any = None
        """Makes the process groups, None on ranks outside; None itself for groups that carry CPU tensors only."""

    @staticmethod
    def region_bytes(capacity: int, channels: int = DEFAULT_CHANNELS, window_bytes: int = DEFAULT_WINDOW_BYTES) -> int:
        """Size of a region for `capacity` ranks and `channels` process groups of more than one rank."""
        return CONTROL_BYTES + channels * _channel_bytes(capacity, window_bytes)

    @staticmethod
    def format(
        fd: int, *, capacity: int, channels: int = DEFAULT_CHANNELS, window_bytes: int = DEFAULT_WINDOW_BYTES
    ) -> ControlPage:
        """Make a region ready for a new server: nobody sits anywhere, no membership. Before any rank starts.

        Raises:
            UserInputError: impossible geometry, or the region is smaller than `region_bytes(...)`.
        """
        if not 1 <= capacity <= MAX_CAPACITY:
            raise UserInputError(f"a capacity of {capacity} ranks", hint=f"Use 1 to {MAX_CAPACITY}.")
        if window_bytes < PAGE_BYTES * capacity or window_bytes % PAGE_BYTES:
            raise UserInputError(
                f"windows of {window_bytes} bytes", hint=f"Use a multiple of {PAGE_BYTES}, at least a page a rank."
            )
        shared = SharedMemory(fd)
        needed = CollectiveRegion.region_bytes(capacity, channels, window_bytes)
        if shared.nbytes < needed:
            raise UserInputError(f"the shared region has {shared.nbytes} bytes, {needed} are needed")
        for index in range(channels):
            start = CONTROL_BYTES + index * _channel_bytes(capacity, window_bytes)
            shared.view[start : start + lines_bytes(capacity)] = bytes(lines_bytes(capacity))
            boxes = start + lines_bytes(capacity) + 2 * capacity * window_bytes
            Mailbox.format(shared, boxes, capacity)
        ControlPage.format(shared, capacity=capacity, channels=channels, window_bytes=window_bytes)
        control = ControlPage(shared)
        shared.close_fd()
        return control

    # The view

    @property
    def members(self) -> tuple[int, ...]:
        """The ranks that take part in this process's collectives, ascending."""
        return self._members

    @property
    def epoch(self) -> int:
        """Epoch of the adopted membership; 0 before the first."""
        return self._epoch

    @property
    def is_solo(self) -> bool:
        """Whether this rank's collectives are local: only itself takes part."""
        return self._members == (self.rank,)

    def set_membership(self, membership: Membership) -> None:
        """Adopt a membership. Every member does so between two collectives, after all met at the commit barrier.

        Raises:
            UserInputError: this rank is not a member, another capacity, or an epoch that this process has left
                behind (channel steps restart at an epoch, so one cannot be entered twice).
        """
        if membership.capacity != self.capacity:
            raise UserInputError(
                f"a membership of {membership.capacity} ranks for a collective region of {self.capacity}"
            )
        if self.rank not in membership.ranks:
            raise UserInputError(
                f"rank {self.rank} is not among {membership.ranks}", hint="A retiring rank calls solo()."
            )
        if not self._adopted_epoch < membership.epoch < _MAX_EPOCH:
            raise UserInputError(
                f"epoch {membership.epoch} cannot follow epoch {self._adopted_epoch}", rank=self.rank, epoch=self._epoch
            )
        self._members, self._epoch = membership.ranks, membership.epoch
        self._adopted_epoch = membership.epoch
        self._changed()

    def solo(self) -> None:
        """Take part alone: a joining rank while it boots and warms up, a rank that has left."""
        self._members = (self.rank,)
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        for listener in self.listeners:
            listener()

    # Channels

    def take_channel(self) -> int:
        """The lowest free channel number. All ranks create their groups in the same order, so they take the same.

        Raises:
            UserInputError: no channel is left.
        """
        if not self._free_channels:
            raise UserInputError(
                f"all {self.control.channels} channels of the collective region are taken by process groups",
                hint="Format the region with more channels.",
            )
        index = min(self._free_channels)
        self._free_channels.remove(index)
        return index

    def return_channel(self, index: int) -> None:
        """A group was destroyed. Its channel keeps its step count for the next group of this epoch."""
        self._free_channels.append(index)

    def channel(self, index: int) -> Channel:
        if index not in self._channels:
            self._channels[index] = Channel(self, index, self._channel_offset(index))
        return self._channels[index]

    def mailbox(self, index: int) -> Mailbox:
        """The point-to-point boxes of a channel."""
        if index not in self._mailboxes:
            offset = self._channel_offset(index) + lines_bytes(self.capacity) + 2 * self.capacity * self.window_bytes
            self._mailboxes[index] = Mailbox(self, index, offset)
        return self._mailboxes[index]

    def _channel_offset(self, index: int) -> int:
        return CONTROL_BYTES + index * _channel_bytes(self.capacity, self.window_bytes)

    # My rank

    def register(self, state: WorkerState = WorkerState.STARTING) -> None:
        """Say in the control page that this process sits in my rank."""
        self.control.register_worker(self.rank, state)

    def close(self) -> None:
        """Say that no worker serves this rank any more and close the descriptor. The mapping goes with the last tensor
        over it."""
        self.control.set_worker_state(self.rank, WorkerState.STANDBY)
        self.shared.close_fd()
