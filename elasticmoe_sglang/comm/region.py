"""The collective region: shared memory in which the ranks of one server meet, and one process's view of it.

Layout: the control page, then the channels of the process groups, each with its words and its windows (two a rank).

The region lies in a memfd that the HMM owns, so it outlives every rank. Its size is that of the largest messages of the
largest server; memory is taken for the pages that were written only (`hmm/vmm/cpu.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from elasticmoe_sglang.comm import futex
from elasticmoe_sglang.comm.channel import Channel, channel_bytes, lines_bytes
from elasticmoe_sglang.comm.control_page import CONTROL_BYTES, PAGE_BYTES, ControlPage, SharedMemory, WorkerState
from elasticmoe_sglang.comm.membership import MAX_CAPACITY, Membership
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.hmm.client import HmmClient, RegionHandle
from elasticmoe_sglang.planner import Placement, View

_CHANNELS = 16
_MAX_EPOCH = 1 << 22
_NAME_PREFIX = "collective-region-"


class CollectiveRegion:
    """One process's view of the region: which ranks take part, and the channels between them.

    The view (`members`, `epoch`) changes only by `set_membership` and `solo`, never by what other processes do. It
    begins solo.

    Args:
        fd: descriptor of the region (duplicated). It must have been formatted: `CollectiveRegion.format(fd, ...)`.
        rank: the rank that this process serves.
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
        self._free_channels = list(range(self.control.channels))
        self._members: tuple[int, ...] = (rank,)
        self._epoch = 0
        self._adopted_epoch = -1
        self.version = 0
        """Grows whenever the view changes; groups compare it to notice."""
        self.listeners: list[Callable[[], None]] = []
        """Called after every change of the view, in the thread that changed it."""
        self.group_type: Any = None
        """Called with (region, ranks, channel, timeout_s) to make a process group, None on ranks outside of it. While
        it is not set, groups carry CPU tensors only."""
        self.group_device = ""
        """Set with `group_type`: type of the devices whose tensors those groups carry beside the CPU's."""

    @staticmethod
    def region_bytes(capacity: int, channels: int, window_bytes: int) -> int:
        """Size of a region for `capacity` ranks and `channels` process groups of more than one rank."""
        return CONTROL_BYTES + channels * channel_bytes(capacity, window_bytes)

    @staticmethod
    def format(fd: int, *, capacity: int, channels: int, window_bytes: int) -> ControlPage:
        """Make a region ready for a new server: no worker registered, no membership. Before any rank starts.

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
            raise UserInputError(f"the collective region has {shared.nbytes} bytes, {needed} are needed")
        for index in range(channels):
            start = CONTROL_BYTES + index * channel_bytes(capacity, window_bytes)
            shared.view[start : start + lines_bytes(capacity)] = bytes(lines_bytes(capacity))
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
        """Collectives become local: for a joining rank while it boots and warms up, and for a rank that has left."""
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
            offset = CONTROL_BYTES + index * channel_bytes(self.capacity, self.window_bytes)
            self._channels[index] = Channel(self.control, self.rank, index, offset)
        return self._channels[index]

    # The worker of this rank

    def register(self, state: WorkerState = WorkerState.STARTING) -> None:
        """Say in the control page that this process serves the rank."""
        self.control.register_worker(self.rank, state)

    def close(self) -> None:
        """Say that no worker serves this rank any more and close the descriptor. The mapping goes with the last tensor
        over it."""
        self.control.set_worker_state(self.rank, WorkerState.STANDBY)
        self.shared.close_fd()


# The region of a server: named in the HMM, formatted by the launcher, opened by every worker


def channels_of(config: ElasticConfig) -> int:
    """Process groups of more than one rank that a server can have. Of those of its attention replicas SGLang makes two
    each, one for the device and one for the CPU."""
    return _CHANNELS + (2 * config.num_replicas if config.attention_tp > 1 else 0)


def _name(run_id: str) -> str:
    return f"{_NAME_PREFIX}{run_id}"


def open_region(client: HmmClient, config: ElasticConfig, run_id: str) -> RegionHandle:
    """The region of the server with this id; made by the first call."""
    nbytes = CollectiveRegion.region_bytes(config.max_ep_size, channels_of(config), config.window_bytes)
    return client.region(_name(run_id), nbytes)


def release_stale_regions(client: HmmClient, run_id: str) -> int:
    """Give back the regions of servers that ended without doing so; an HMM that outlives its server keeps them.

    The memory goes when the last process that maps a region has ended. Returns how many there were.
    """
    stale = [
        block.block_id
        for block in client.lookup(kind="window")
        if block.name is not None and block.name.startswith(_NAME_PREFIX) and block.name != _name(run_id)
    ]
    if stale:
        client.release(stale)
    return len(stale)


def format_region(region: RegionHandle, config: ElasticConfig) -> ControlPage:
    """Before the first rank starts: no worker registered, and the first membership in epoch 0.

    Returns:
        The control page with a descriptor of its own, which the commit barrier's lock needs.
    """
    control = CollectiveRegion.format(
        region.fd, capacity=config.max_ep_size, channels=channels_of(config), window_bytes=config.window_bytes
    )
    membership = Membership(ranks=tuple(range(config.ep_size)), epoch=0, capacity=config.max_ep_size)
    control.publish(View(membership=membership, placement=Placement(owners=())))
    return ControlPage(SharedMemory(region.fd))
