"""The windows of device memory through which the ranks' kernels exchange data, and the kernels' view of the membership.

Every rank has one window. The HMM owns it, its rank fills it, the peers map it at an address that was reserved for this
rank from the start; so no kernel and no captured graph ever sees another address. A control block on the device,
written here between two launches, tells the kernels which ranks take part (`elasticmoe_kernels.triton.windows`).

A rank names its window in the control page. The next worker of a rank brings a new window; peers that had the old one
mapped exchange them when they adopt the membership in which the rank comes back.

`CollectiveRegion.set_membership` and `CollectiveRegion.solo` call `adopt`, which writes the control block before they
return. Nothing of an earlier epoch may still run on any member's device then: each calls `drain` before it goes to the
commit barrier.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch

from elasticmoe_kernels.triton import windows as w
from elasticmoe_kernels.triton.collectives import Group
from elasticmoe_sglang.comm.control_page import WINDOW_BLOCK
from elasticmoe_sglang.comm.engine import GroupEngine
from elasticmoe_sglang.comm.header import Op, pack_header
from elasticmoe_sglang.comm.membership import ranks_to_mask
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.errors import (
    CollectiveError,
    CollectiveMismatch,
    PeerDied,
    PeerTimeout,
    UserInputError,
    WorkerError,
)
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.vmm import VmmHandle, round_up
from elasticmoe_sglang.hmm.vmm.tensors import MappedRange, tensor_in

_LONGEST_S = 3600.0
_LOOK_S = 0.001
_REPLAY = pack_header(Op.REPLAY)
_HINT = "The group works again after the next membership."


class CudaRegion:
    """One rank's windows and control block.

    Args:
        client: where device memory comes from; its backend maps it.
        region: says which ranks take part. From here on its changes reach the device.
        device: number of the device this rank computes on.
        layout: the same on all ranks; None for the default with the region's capacity.
        device_of: rank -> its device; None: all ranks are on one device.
        attach_s: how long a peer may take to name its window.

    Raises:
        BudgetExceeded: no room for the window.
        WorkerError: a member of the current view named no window in time.
    """

    def __init__(
        self,
        client: HmmClient,
        region: CollectiveRegion,
        *,
        device: int,
        layout: w.WindowLayout | None = None,
        device_of: Callable[[int], int] | None = None,
        attach_s: float = 60.0,
    ) -> None:
        self.region = region
        self.layout = layout or w.WindowLayout(capacity=region.capacity)
        assert self.layout.capacity == region.capacity
        self._client = client
        self._device_of = device_of or (lambda _rank: 0)
        self._everybody: GroupEngine | None = None
        self._attach_s = attach_s
        backend = client.backend
        self.device = torch.device(backend.torch_device(device))
        self._pitch = round_up(self.layout.window_bytes, backend.granularity)
        on_gpu = self.device.type == "cuda"
        # The context comes first: a mapping is made for the devices that have one.
        self._control = torch.zeros(self.layout.control_words, dtype=torch.int64, device=self.device)
        self._staged = torch.zeros(self.layout.control_words, dtype=torch.int64, pin_memory=on_gpu)
        self._words = torch.zeros(2, dtype=torch.int64, pin_memory=on_gpu)
        self._error_word = ctypes.c_uint64.from_address(self._words.data_ptr())
        self._stop_word = ctypes.c_uint64.from_address(self._words.data_ptr() + 8)
        self._range = MappedRange(backend, self.layout.capacity * self._pitch)
        self._mapped: dict[int, int] = {}  # rank -> block id of its window
        self._channels: dict[tuple[int, ...], int] = {}
        self._open_own_window(device)
        self.windows = w.Windows(
            layout=self.layout,
            base=self._range.va.base,
            pitch=self._pitch,
            control=self._control.data_ptr(),
            rank=region.rank,
        )
        region.listeners.append(self.adopt)
        self.adopt()

    # Windows -----------------------------------------------------------------------------------------------------

    def _open_own_window(self, device: int) -> None:
        me, words = self.region.rank, self.region.control.words
        word = self.region.control.rank_word(me, WINDOW_BLOCK)
        former, words[word] = words[word], 0
        [block] = self._client.allocate(device, "window", nbytes=self.layout.window_bytes)
        [handle] = self._client.handles([block.block_id])
        self._map(me, block.block_id, handle)
        flags = tensor_in(self._range.storage(device), me * self._pitch, (self.layout.data_offset,), "uint8")
        flags.zero_()
        self.drain()
        words[word] = block.block_id + 1
        if former:
            # The window of the rank's previous worker. Peers that still map it keep it until they exchange it.
            held = {b.block_id for b in self._client.lookup(kind="window")}
            if former - 1 in held:
                self._client.release([former - 1])

    def prefetch(self, members: tuple[int, ...]) -> None:
        """Map the windows of joining ranks ahead of the commit. From any thread, while kernels run.

        Windows that are mapped already stay as they are: only `adopt` exchanges them.
        """
        for rank in members:
            if rank not in self._mapped:
                self._attach(rank)

    def _attach(self, rank: int) -> None:
        block_id = self._named_window(rank)
        if self._mapped.get(rank) == block_id:
            return
        [handle] = self._client.handles([block_id])
        if rank in self._mapped:
            self._range.unmap(rank * self._pitch)
            del self._mapped[rank]
        self._map(rank, block_id, handle)

    def _map(self, rank: int, block_id: int, handle: VmmHandle) -> None:
        try:
            self._range.map(rank * self._pitch, handle)
        finally:
            self._client.backend.close(handle)
        self._mapped[rank] = block_id

    def _named_window(self, rank: int) -> int:
        control = self.region.control
        word = control.rank_word(rank, WINDOW_BLOCK)
        deadline = time.monotonic() + self._attach_s
        while not control.words[word]:
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"rank {rank} named no window of device memory within {self._attach_s:g} s",
                    rank=rank,
                    epoch=self.region.epoch,
                    hint="Its process is still booting, or has failed: see its log.",
                )
            time.sleep(_LOOK_S)
        return control.words[word] - 1

    # The view ----------------------------------------------------------------------------------------------------

    def adopt(self) -> None:
        """Write the region's view to the device: members, epoch, steps from zero, no failure."""
        region = self.region
        self.drain()
        for rank in region.members:
            self._attach(rank)
        staged = self._staged.zero_()
        staged[w.EPOCH] = region.epoch
        mask = ranks_to_mask(region.members)
        staged[w.MEMBERS] = mask - (1 << 64) if mask >> 63 else mask
        staged[w.DEADLINE_NS] = int(min(region.timeout_s, _LONGEST_S) * 1e9)
        staged[w.ERROR_ADDRESS] = self._words.data_ptr()
        staged[w.STOP_ADDRESS] = self._words.data_ptr() + 8
        self._error_word.value = self._stop_word.value = 0
        self._control.copy_(staged, non_blocking=True)
        self.drain()

    def drain(self) -> None:
        """Wait until nothing runs on this rank's device that this process launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # Groups ------------------------------------------------------------------------------------------------------

    def channel_of(self, ranks: tuple[int, ...]) -> int:
        """The windows' channel that all groups of these ranks share. Every rank asks for every group, in one order.

        Raises:
            UserInputError: there are groups of more different sets of ranks than channels.
        """
        if ranks not in self._channels:
            if len(self._channels) == self.layout.channels:
                raise UserInputError(
                    f"device groups of more than {self.layout.channels} different sets of ranks",
                    hint="Make the windows' layout with more channels.",
                )
            self._channels[ranks] = len(self._channels)
        return self._channels[ranks]

    def group(self, ranks: tuple[int, ...]) -> Group:
        """A group that this rank belongs to, for the kernels. Allocates: before a graph is captured."""
        members = ranks_to_mask(ranks)
        return Group(
            channel=self.channel_of(ranks),
            rank=ranks.index(self.region.rank),
            size=len(ranks),
            mask=members - (1 << 64) if members >> 63 else members,
            global_ranks=torch.tensor(ranks, dtype=torch.int32, device=self.device),
        )

    # Launching ---------------------------------------------------------------------------------------------------

    def rendezvous(self, engine: GroupEngine, header: int) -> None:
        """Return when the hosts of all active ranks of a group have reached the launch that `header` describes.

        A kernel that waits for a peer holds its place on the device. If that peer's host then calls the driver for
        anything that waits for the device (Triton loads a module, torch's pool grows), also from another process
        under MPS, neither ever ends. So the ranks of a device launch a collective only when all of them have reached
        it, and nothing lies between this call and the launch. One rank a device need not: its driver waits for its
        own kernels alone, and the rank that is furthest behind can always go on. A capture launches nothing.

        Raises:
            PeerDied, PeerTimeout, CollectiveMismatch: as any collective of the group.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        engine.refresh()
        if not engine.local and self._crowded(engine):
            engine.barrier(header=header)

    def _crowded(self, engine: GroupEngine) -> bool:
        """Whether two active ranks of the group are on one device: a fact of the epoch, the same for all members."""
        devices = [self._device_of(engine.ranks[rank]) for rank in engine.present]
        return len(set(devices)) < len(devices)

    def serve_replays(self, engine: GroupEngine) -> None:
        """The group through which hosts meet before a graph is replayed: the first that has all ranks."""
        if self._everybody is None and engine.size == self.region.capacity:
            self._everybody = engine

    def rendezvous_for_replay(self) -> None:
        """Before a captured graph with collectives in it is replayed; see `rendezvous`."""
        if self._everybody is not None:
            self.rendezvous(self._everybody, _REPLAY)

    # Failures ----------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what a kernel reported in this epoch. Reads one word of host memory: call it wherever results are used.

        A kernel that gave up has left meaningless results, and so has everything that was launched after it.

        Raises:
            PeerDied, PeerTimeout, CollectiveMismatch: also at every later call until the next membership.
        """
        if self._error_word.value:
            failure = w.Failure.unpack(self._error_word.value)
            assert failure is not None
            raise self._error_for(failure)

    def stop_waiting(self) -> None:
        """A peer is lost: kernels that wait for it, now or later in this epoch, give up at once instead of at the
        deadline. Calls no driver: that could wait for those very kernels."""
        self._stop_word.value = self.region.epoch + 1

    def _error_for(self, failure: w.Failure) -> CollectiveError:
        rank, timeout_s = failure.rank, min(self.region.timeout_s, _LONGEST_S)
        kind: type[CollectiveError] = PeerTimeout
        text = f"rank {rank} did not arrive within {timeout_s:g} s"
        if failure.kind == w.MISMATCHED:
            kind, text = CollectiveMismatch, f"rank {rank} called another collective than rank {self.region.rank}"
        elif failure.kind == w.TOLD_OF_MISMATCH:
            kind, text = CollectiveMismatch, f"rank {rank} found that the ranks called different collectives"
        elif failure.kind == w.TOLD:
            text = f"rank {rank} gave up waiting for another rank"
        elif not self.region.control.alive(rank):
            kind, text = PeerDied, f"the process of rank {rank} is gone"
        where = f"{Op(failure.operation).name.lower()} on the device, channel {failure.channel}, step {failure.step}"
        return kind(text, rank=rank, epoch=self.region.epoch, operation=where, hint=_HINT)

    def close(self) -> None:
        """Give the windows back. No kernel may use them any more."""
        self.drain()
        self.region.listeners.remove(self.adopt)
        self._range.close()
        word = self.region.control.rank_word(self.region.rank, WINDOW_BLOCK)
        self.region.control.words[word] = 0
        self._client.release([self._mapped[self.region.rank]])
