"""The collectives themselves, on contiguous memory, among the members of one process group.

`rank` is a group rank here, and `ranks[rank]` its global rank. A group rank is present when its global rank is among
the region's members. When only this rank is present everything is local and nothing shared is touched.

Nothing is copied for absent ranks. The caller decides what their rows of an output become (`process_group.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from elasticmoe_sglang.comm.channel import Channel
from elasticmoe_sglang.comm.copying import copy_bytes
from elasticmoe_sglang.comm.header import Op, Reduction, pack_header
from elasticmoe_sglang.comm.reduce import reduce_into
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.errors import RankInactive

_LINE = 64
# From this size on, three or more members combine one slice each and exchange the results, instead of each all.
_SLICED_BYTES = 64 << 10
_MAX_VIEWS = 4096


class GroupEngine:
    """Args:
    region: whose members take part.
    ranks: global rank of each group rank.
    channel: channel number, or None for a group of one, which is always local.
    timeout_s: how long a member may be late.
    """

    def __init__(self, region: CollectiveRegion, ranks: tuple[int, ...], channel: int | None, timeout_s: float) -> None:
        self.region = region
        self.ranks = ranks
        self.size = len(ranks)
        self.rank = ranks.index(region.rank)
        self.channel_index = channel
        self.timeout_s = min(timeout_s, region.timeout_s)
        self.local = True
        self.present: tuple[int, ...] = ()
        self.absent: tuple[int, ...] = ()
        self.absent_runs: tuple[tuple[int, int], ...] = ()
        """(first rank, how many) of neighbouring absent ranks."""
        self._version = -1
        self._channel: Channel | None = None
        self._window = region.window_bytes
        self._my_windows: tuple[int, int] = (0, 0)
        self._peers: tuple[tuple[int, tuple[int, int]], ...] = ()
        self._bytes = torch.frombuffer(region.shared.memory, dtype=torch.uint8)
        self._views: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def refresh(self) -> None:
        """Take over the region's members if they have changed. Every collective begins with this."""
        region = self.region
        if self._version == region.version:
            return
        self._version = region.version
        members = frozenset(region.members)
        self.present = tuple(rank for rank, global_rank in enumerate(self.ranks) if global_rank in members)
        self.absent = tuple(rank for rank in range(self.size) if rank not in self.present)
        runs: list[tuple[int, int]] = []
        for rank in self.absent:
            if runs and sum(runs[-1]) == rank:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((rank, 1))
        self.absent_runs = tuple(runs)
        self.local = self.channel_index is None or len(self.present) == 1
        if self.local:
            return
        assert self.channel_index is not None
        channel = self._channel = region.channel(self.channel_index)
        channel.enter(tuple(self.ranks[rank] for rank in self.present), region.epoch)

        def windows(rank: int) -> tuple[int, int]:
            global_rank = self.ranks[rank]
            return channel.window_address(global_rank, 0), channel.window_address(global_rank, 1)

        self._my_windows = windows(self.rank)
        self._peers = tuple((rank, windows(rank)) for rank in self.present if rank != self.rank)

    @property
    def channel(self) -> Channel:
        assert self._channel is not None, "a local group has no channel"
        return self._channel

    def require_present(self, rank: int, op: Op) -> None:
        """Raises RankInactive when the group rank `rank` is absent."""
        if rank not in self.present:
            raise RankInactive(
                f"rank {self.ranks[rank]} (group rank {rank}) is not among the active ranks {self.region.members}",
                rank=self.ranks[rank],
                epoch=self.region.epoch,
                operation=op.name.lower(),
            )

    def _view(self, rank: int, parity: int, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """`count` values at byte `start` of a rank's window, as a tensor over the shared memory."""
        offset = self.channel.window_offset(self.ranks[rank], parity) + start
        key = (offset, count, dtype)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            view = self._bytes[offset : offset + count * dtype.itemsize].view(dtype)
            self._views[key] = view
        return view

    def barrier(self, timeout_s: float | None = None, header: int = pack_header(Op.BARRIER)) -> None:
        """Return when every present rank has come with the same header."""
        if not self.local:
            self.channel.meet(header, self.timeout_s if timeout_s is None else timeout_s)

    def all_gather(self, source: int, nbytes: int, targets: Sequence[int], header: int) -> None:
        """targets[r] = rank r's `nbytes` bytes, for every present rank.

        Args:
            source: address of my bytes.
            targets: address for each rank's bytes, absent ranks included (not touched).
        """
        if not self.local:
            channel, window, timeout_s = self.channel, self._window, self.timeout_s
            done = 0
            while True:
                piece = nbytes - done if nbytes - done < window else window
                parity = channel.next_parity
                copy_bytes(self._my_windows[parity], source + done, piece)
                channel.meet(header, timeout_s)
                for rank, windows in self._peers:
                    copy_bytes(targets[rank] + done, windows[parity], piece)
                done += piece
                if done >= nbytes:
                    break
        mine = targets[self.rank]
        if mine != source:
            copy_bytes(mine, source, nbytes)

    def broadcast(self, address: int, nbytes: int, root: int, header: int) -> None:
        """Every present rank's `nbytes` bytes at `address` become the root's. Local groups keep their own."""
        if self.local:
            return
        channel = self.channel
        done = 0
        while True:
            piece = min(self._window, nbytes - done)
            parity = channel.next_parity
            if root == self.rank:
                copy_bytes(self._my_windows[parity], address + done, piece)
            channel.meet(header, self.timeout_s)
            if root != self.rank:
                copy_bytes(address + done, channel.window_address(self.ranks[root], parity), piece)
            done += piece
            if done >= nbytes:
                break

    def gather(self, source: int, nbytes: int, targets: Sequence[int], root: int, header: int) -> None:
        """On the root: targets[r] = rank r's bytes for every present rank. `targets` is empty elsewhere."""
        if not self.local:
            channel = self.channel
            done = 0
            while True:
                piece = min(self._window, nbytes - done)
                parity = channel.next_parity
                if root != self.rank:
                    copy_bytes(self._my_windows[parity], source + done, piece)
                channel.meet(header, self.timeout_s)
                if root == self.rank:
                    for rank, windows in self._peers:
                        copy_bytes(targets[rank] + done, windows[parity], piece)
                done += piece
                if done >= nbytes:
                    break
        if root == self.rank and targets[root] != source:
            copy_bytes(targets[root], source, nbytes)

    def all_reduce(self, values: Tensor, reduction: Reduction, header: int, root: int | None = None) -> None:
        """values = all present ranks' values combined, in rank order, the same bits everywhere.

        Args:
            values: [n], contiguous.
            root: when given, only this rank gets the result; the others keep their values.
        """
        if self.local:
            return
        dtype, width = values.dtype, values.element_size()
        count, room = values.numel(), self._window // width
        address = values.data_ptr()
        done = 0
        while True:
            piece = min(room, count - done)
            if root is None and len(self.present) > 2 and piece * width >= _SLICED_BYTES:
                self._all_reduce_sliced(address + done * width, piece, dtype, reduction, header)
            else:
                parity = self.channel.next_parity
                copy_bytes(self._my_windows[parity], address + done * width, piece * width)
                self.channel.meet(header, self.timeout_s)
                if root is None or root == self.rank:
                    parts = [self._view(rank, parity, 0, piece, dtype) for rank in self.present]
                    reduce_into(values[done : done + piece] if piece < count else values, parts, reduction)
            done += piece
            if done >= count:
                break

    def _all_reduce_sliced(
        self, address: int, count: int, dtype: torch.dtype, reduction: Reduction, header: int
    ) -> None:
        channel, width = self.channel, dtype.itemsize
        members = len(self.present)
        # Slices begin at cache lines, so that two writers never share one.
        share = -(-count // members)
        share = -(-share * width // _LINE) * _LINE // width
        slices = [(min(slot * share, count), min((slot + 1) * share, count)) for slot in range(members)]
        parity = channel.next_parity
        copy_bytes(self._my_windows[parity], address, count * width)
        channel.meet(header, self.timeout_s)
        first, last = slices[self.present.index(self.rank)]
        after = parity ^ 1
        if first < last:
            parts = [self._view(rank, parity, first * width, last - first, dtype) for rank in self.present]
            reduce_into(self._view(self.rank, after, first * width, last - first, dtype), parts, reduction)
        channel.meet(header, self.timeout_s)
        for rank, (first, last) in zip(self.present, slices, strict=True):
            begin, nbytes = first * width, (last - first) * width
            copy_bytes(address + begin, channel.window_address(self.ranks[rank], after) + begin, nbytes)

    def reduce_scatter(self, out: Tensor, sources: Sequence[int], reduction: Reduction, header: int) -> None:
        """out = the present ranks' sources[my rank] combined, in rank order.

        Args:
            out: [n], contiguous.
            sources: address of n values for each rank; those for absent ranks are not read.
        """
        if self.local:
            copy_bytes(out.data_ptr(), sources[self.rank], out.nbytes)
            return
        channel, dtype, width = self.channel, out.dtype, out.element_size()
        pitch = self._pitch()
        room, count = pitch // width, out.numel()
        begin = self.present.index(self.rank) * pitch
        done = 0
        while True:
            piece = min(room, count - done)
            parity = channel.next_parity
            for slot, rank in enumerate(self.present):
                copy_bytes(self._my_windows[parity] + slot * pitch, sources[rank] + done * width, piece * width)
            channel.meet(header, self.timeout_s)
            parts = [self._view(rank, parity, begin, piece, dtype) for rank in self.present]
            reduce_into(out[done : done + piece] if piece < count else out, parts, reduction)
            done += piece
            if done >= count:
                break

    def _pitch(self) -> int:
        """Bytes of a window for each present rank, a multiple of a cache line."""
        return self._window // len(self.present) // _LINE * _LINE
