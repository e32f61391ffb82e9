"""A rank's address space for weights: a slot for every expert column, and one block for all that is no expert.

Addresses are reserved once and never move, so tensors and captured graphs made over them stay valid while columns
come and go. Slot number, column number and physical expert number are the same thing; a rank maps only its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from elasticmoe_sglang.errors import VmmError
from elasticmoe_sglang.hmm.layout import ITEM_BYTES, ColumnLayout, DenseLayout
from elasticmoe_sglang.hmm.pull import PullStats, pull_bytes
from elasticmoe_sglang.hmm.vmm.base import VmmBackend, VmmHandle, round_up
from elasticmoe_sglang.hmm.vmm.tensors import MappedRange, contiguous_strides, tensor_in

if TYPE_CHECKING:
    import torch

__all__ = ["ColumnSpace", "DenseSpace", "PullStats"]


class ColumnSpace:
    """Slots of one pitch each, mapped and unmapped one by one. Thread-safe for different slots.

    Args:
        num_columns: of the model; column_bytes: of one, as its layout says.
        max_slots: how many slots to reserve; None: one a column.
        device: the device the views are on.

    Attributes:
        pitch: bytes from one slot to the next, and of every handle mapped here: column_bytes rounded up.
    """

    def __init__(
        self,
        backend: VmmBackend,
        num_columns: int,
        column_bytes: int,
        max_slots: int | None = None,
        *,
        device: int = 0,
    ) -> None:
        self.backend = backend
        self.device = device
        self.num_columns = num_columns
        self.column_bytes = column_bytes
        self.max_slots = num_columns if max_slots is None else max_slots
        self.pitch = round_up(column_bytes, backend.granularity)
        self._range = MappedRange(backend, self.max_slots * self.pitch)
        self._busy: set[int] = set()
        self._lock = threading.Lock()

    def address(self, slot: int) -> int:
        """Where the slot starts."""
        self._require(slot)
        return self._range.va.base + slot * self.pitch

    def mapped(self) -> set[int]:
        """Slots with a column behind them."""
        return {offset // self.pitch for offset in self._range.offsets()}

    def map_column(self, slot: int, handle: VmmHandle) -> None:
        """Puts a column's memory into its slot. Closes the handle, whatever happens: the mapping keeps the memory."""
        with _closing(self.backend, handle):
            if handle.nbytes != self.pitch:
                raise VmmError(f"a column of {handle.nbytes} bytes does not fit slots of {self.pitch} bytes")
            with self._using(slot):
                self._range.map(slot * self.pitch, handle)

    def unmap_column(self, slot: int) -> None:
        """Empties the slot. No launched kernel may still read it; the lease goes back to the HMM."""
        with self._using(slot):
            self._range.unmap(slot * self.pitch)

    def pull(
        self,
        slot: int,
        source: VmmHandle,
        *,
        chunk_bytes: int | None = None,
        bytes_per_second: float | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> PullStats:
        """Fills a mapped slot from a peer's column and closes `source`, whatever happens. For a background thread.

        Seal the block only when the result says `complete`.
        """
        with _closing(self.backend, source), self._using(slot):
            return pull_bytes(
                self.backend,
                self.address(slot),
                source,
                self.column_bytes,
                chunk_bytes=chunk_bytes,
                bytes_per_second=bytes_per_second,
                should_stop=should_stop,
            )

    def views(self, layout: ColumnLayout) -> dict[str, torch.Tensor]:
        """For each tensor of the layout all slots of it: [max_slots, *shape], stride `pitch` between slots.

        Only mapped slots may be touched, also by printing or summing.
        """
        if layout.column_bytes > self.column_bytes:
            raise VmmError(f"a layout of {layout.column_bytes} bytes exceeds columns of {self.column_bytes} bytes")
        storage = self._range.storage(self.device)
        views = {}
        for spec in layout.specs:
            strides = [self.pitch // ITEM_BYTES[spec.dtype], *contiguous_strides(spec.shape)]
            shape = (self.max_slots, *spec.shape)
            views[spec.name] = tensor_in(storage, layout.offsets[spec.name], shape, spec.dtype, strides)
        return views

    def close(self) -> None:
        """Unmaps every column once no view is left. Idempotent."""
        self._range.close()

    def _require(self, slot: int) -> None:
        if not 0 <= slot < self.max_slots:
            raise VmmError(f"slot {slot} does not exist, there are {self.max_slots}")

    @contextmanager
    def _using(self, slot: int) -> Iterator[None]:
        self._require(slot)
        with self._lock:
            if slot in self._busy:
                raise VmmError(f"slot {slot} is being filled or changed by another thread", hint="Wait for it.")
            self._busy.add(slot)
        try:
            yield
        finally:
            self._busy.discard(slot)


class DenseSpace:
    """The one block with everything that is no expert.

    Attributes:
        nbytes: of the handle that is mapped here: the layout's, rounded up.
    """

    def __init__(self, backend: VmmBackend, layout: DenseLayout, *, device: int = 0) -> None:
        self.backend = backend
        self.device = device
        self.layout = layout
        self.nbytes = round_up(layout.dense_bytes, backend.granularity)
        self._range = MappedRange(backend, self.nbytes)

    def map(self, handle: VmmHandle) -> None:
        """Puts the block's memory in place. Closes the handle, whatever happens: the mapping keeps the memory."""
        with _closing(self.backend, handle):
            if handle.nbytes != self.nbytes:
                raise VmmError(f"a block of {handle.nbytes} bytes does not fit a dense layout of {self.nbytes} bytes")
            self._range.map(0, handle)

    def pull(
        self,
        source: VmmHandle,
        *,
        chunk_bytes: int | None = None,
        bytes_per_second: float | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> PullStats:
        """Fills the mapped block from another device's and closes `source`, whatever happens."""
        with _closing(self.backend, source):
            return pull_bytes(
                self.backend,
                self._range.va.base,
                source,
                self.layout.dense_bytes,
                chunk_bytes=chunk_bytes,
                bytes_per_second=bytes_per_second,
                should_stop=should_stop,
            )

    def views(self) -> dict[str, torch.Tensor]:
        """Contiguous tensors by name. Only to be touched once mapped."""
        storage = self._range.storage(self.device)
        return {
            spec.name: tensor_in(storage, self.layout.offsets[spec.name], spec.shape, spec.dtype)
            for spec in self.layout.specs
        }

    def close(self) -> None:
        """Unmaps the block once no tensor over it is left. Idempotent."""
        self._range.close()


@contextmanager
def _closing(backend: VmmBackend, handle: VmmHandle) -> Iterator[None]:
    try:
        yield
    finally:
        backend.close(handle)
