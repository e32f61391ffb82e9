"""Tensors over mapped memory. torch is imported when the first tensor is made, so the HMM never loads it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from elasticmoe_sglang.errors import VmmError
from elasticmoe_sglang.hmm.vmm.base import VmmBackend, VmmHandle

if TYPE_CHECKING:
    import torch


class MappedRange:
    """Address space, what is mapped in it, and the torch storages over it.

    `close` gives all of it back, but not before the last storage is gone: a tensor never outlives its memory. Storages
    that live until the process ends are left to the kernel.
    """

    def __init__(self, backend: VmmBackend, nbytes: int) -> None:
        self._backend = backend
        self.va = backend.reserve(nbytes)
        self._mapped: dict[int, int] = {}  # offset -> bytes
        self._storages = 0
        self._closing = False
        self._closed = False

    def map(self, offset: int, handle: VmmHandle) -> None:
        """Maps `handle` at `offset`. The caller may close it then: the mapping keeps the memory."""
        if self._closing:
            raise VmmError("nothing can be mapped into a range that was closed")
        self._backend.map(self.va.base + offset, handle)
        self._mapped[offset] = handle.nbytes

    def unmap(self, offset: int) -> None:
        """Nothing may read or write the memory at `offset` any more."""
        if offset not in self._mapped:
            raise VmmError(f"nothing is mapped at offset {offset}")
        self._backend.unmap(self.va.base + offset, self._mapped[offset])
        del self._mapped[offset]

    def offsets(self) -> list[int]:
        """Where something is mapped."""
        return list(self._mapped)

    def storage(self, device: int) -> torch.UntypedStorage:
        """A storage over the whole range, mapped or not; touching what is not mapped is a fault."""
        if self._closing:
            raise VmmError("a range that was closed gives no tensors")
        storage = self._backend.storage(self.va.base, self.va.nbytes, device)
        self._storages += 1
        # Until the storage dies, its finalizer keeps this range alive. At the process's end the kernel unmaps; doing
        # it in Python would take memory from threads that still run.
        weakref.finalize(storage, self._backend.when_idle, self._storage_gone).atexit = False
        return storage

    def close(self) -> None:
        """Unmaps everything and releases the addresses, once no tensor over them is left. Idempotent."""
        self._closing = True
        self._backend.when_idle(self._finish)

    def _storage_gone(self) -> None:
        self._storages -= 1
        self._finish()

    def _finish(self) -> None:
        if not self._closing or self._storages or self._closed:
            return
        self._closed = True
        for offset in self.offsets():
            self.unmap(offset)
        self._backend.release_va(self.va)


def tensor_in(
    storage: torch.UntypedStorage, offset: int, shape: Sequence[int], dtype: str, stride: Sequence[int] | None = None
) -> torch.Tensor:
    """A tensor at byte `offset` of `storage`; contiguous unless `stride` (in elements) says otherwise."""
    import torch

    kind = getattr(torch, dtype)
    item = kind.itemsize
    assert offset % item == 0, f"offset {offset} is not a multiple of {dtype}'s {item} bytes"
    view = torch.empty(0, dtype=kind, device=storage.device)
    return view.set_(storage, offset // item, tuple(shape), tuple(stride or contiguous_strides(shape)))


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Strides, in elements, of a contiguous tensor."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides
