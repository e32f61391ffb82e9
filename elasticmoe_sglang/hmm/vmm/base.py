"""The virtual-memory interface that every device backend fills in, and the bookkeeping they share.

A backend is one short file: it implements the underscored methods with its driver's calls. The public methods here
check the arguments, record what is reserved, mapped and open, and turn misuse into a `VmmError`, so that a wrong
address is an exception and not a fault in the driver. Sizes and addresses are bytes throughout.

The life of memory: `create` makes physical memory, `export` a descriptor of it that another process turns back into a
handle with `import_`. `reserve` takes address space with nothing behind it, `map` puts a handle there. A handle may be
closed as soon as it is mapped: the mapping keeps the memory. Once it is closed *and* mapped nowhere, `on_free` is
called; the HMM's client returns its lease there.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from elasticmoe_sglang.errors import VmmError

if TYPE_CHECKING:
    import torch


def round_up(nbytes: int, granularity: int) -> int:
    """The smallest multiple of `granularity` that holds `nbytes`."""
    return -(-nbytes // granularity) * granularity


@dataclass(frozen=True, kw_only=True)
class VaRange:
    """Reserved address space [base, base + nbytes)."""

    base: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.base + self.nbytes


@dataclass(kw_only=True, eq=False)
class VmmHandle:
    """One piece of physical memory, as this process knows it.

    native: what the driver calls it (CPU: a file descriptor); meaningless once closed.
    nbytes: its size, a multiple of the backend's granularity.
    device: number of the device (CPU: of the HMM arena) it lies on; HOST for memory of no device.
    imported: made by another process.
    on_free: called once, when the handle is closed and no longer mapped.
    """

    native: int
    nbytes: int
    device: int
    imported: bool
    on_free: Callable[[], None] | None = None
    is_open: bool = True
    maps: int = 0


@dataclass(frozen=True, kw_only=True)
class VmmUsage:
    """What a process holds through one backend; all zero once everything was given back."""

    reserved_bytes: int
    mapped_bytes: int
    mappings: int
    open_handles: int


@dataclass(kw_only=True)
class _Reservation:
    va: VaRange
    starts: list[int] = field(default_factory=list)  # sorted
    handles: dict[int, VmmHandle] = field(default_factory=dict)

    def covers(self, start: int, nbytes: int) -> bool:
        """Whether every byte of [start, start + nbytes) is mapped."""
        end = start + nbytes
        index = bisect.bisect_right(self.starts, start) - 1
        if index < 0:
            return False
        while start < end:
            if index >= len(self.starts):
                return False
            base = self.starts[index]
            if not base <= start < base + self.handles[base].nbytes:
                return False
            start = base + self.handles[base].nbytes
            index += 1
        return True

    def overlaps(self, start: int, nbytes: int) -> bool:
        """Whether any byte of [start, start + nbytes) is mapped."""
        index = bisect.bisect_left(self.starts, start + nbytes) - 1
        return index >= 0 and self.starts[index] + self.handles[self.starts[index]].nbytes > start


class VmmBackend(ABC):
    """Physical memory, address space and the mapping between them, for one kind of device.

    Thread-safe. What a caller must still see to: nothing may read or write a range while it is being unmapped.
    """

    name: ClassVar[str]
    copy_chunk_bytes: ClassVar[int] = 8 << 20
    """How much a background copy should take at once: small enough to stop within a few milliseconds, large enough that
    the calls between chunks cost nothing."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0  # of `_books` in the thread that holds the lock
        self._later: deque[Callable[[], None]] = deque()
        self._reservations: dict[int, _Reservation] = {}
        self._bases: list[int] = []  # sorted keys of _reservations
        self._open_handles = 0

    # What a backend implements ---------------------------------------------------------------------------------

    @property
    @abstractmethod
    def granularity(self) -> int:
        """Sizes and mapped addresses are multiples of this."""

    @abstractmethod
    def torch_device(self, device: int) -> str:
        """The name torch gives the device, such as "cpu" or "cuda:1"."""

    @abstractmethod
    def check(self, status: int, call: str) -> None:
        """Raises VmmError when `status`, the driver's return value of `call`, says that it failed."""

    @abstractmethod
    def _reserve(self, nbytes: int) -> int:
        """Returns the base address."""

    @abstractmethod
    def _release_va(self, va: VaRange) -> None: ...

    @abstractmethod
    def _create(self, nbytes: int, device: int) -> int:
        """Returns the native handle of zeroed physical memory."""

    @abstractmethod
    def _map(self, va: int, handle: VmmHandle) -> None:
        """Maps all of the handle, readable and writable by the device it is used from."""

    @abstractmethod
    def _unmap(self, va: int, nbytes: int) -> None:
        """Leaves the addresses reserved."""

    @abstractmethod
    def _export(self, handle: VmmHandle) -> int:
        """Returns a descriptor that the caller owns. May be asked several times for one handle."""

    @abstractmethod
    def _import(self, fd: int, nbytes: int, device: int) -> int:
        """Returns the native handle. Owns `fd`, also when it fails."""

    @abstractmethod
    def _copy(self, dst: int, src: int, nbytes: int) -> None:
        """Returns when the bytes are there; must let other Python threads run meanwhile."""

    @abstractmethod
    def _close(self, handle: VmmHandle) -> None: ...

    def storage(self, va: int, nbytes: int, device: int) -> torch.UntypedStorage:
        """A torch storage over [va, va + nbytes). It owns nothing: see tensors.py for who keeps the range."""
        import torch

        storage: torch.UntypedStorage = torch._C._construct_storage_from_data_pointer(  # type: ignore[assignment]
            va, torch.device(self.torch_device(device)), nbytes
        )
        return storage

    # What callers use --------------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> VaRange:
        """Takes address space for `nbytes`, rounded up to the granularity, with nothing behind it."""
        if nbytes <= 0:
            raise VmmError(f"cannot reserve {nbytes} bytes of address space")
        nbytes = round_up(nbytes, self.granularity)
        va = VaRange(base=self._reserve(nbytes), nbytes=nbytes)
        with self._books():
            self._reservations[va.base] = _Reservation(va=va)
            bisect.insort(self._bases, va.base)
        return va

    def release_va(self, va: VaRange) -> None:
        """Gives address space back. Raises VmmError while anything is mapped in it."""
        with self._books():
            reservation = self._reservations.get(va.base)
            if reservation is None or reservation.va != va:
                raise VmmError(f"{_span(va.base, va.nbytes)} was not reserved here")
            if reservation.starts:
                raise VmmError(
                    f"{_span(va.base, va.nbytes)} still has {len(reservation.starts)} mappings",
                    hint="Unmap them before releasing the address space.",
                )
            del self._reservations[va.base]
            self._bases.remove(va.base)
        self._release_va(va)

    def create(self, nbytes: int, device: int) -> VmmHandle:
        """Makes zeroed physical memory on `device`; `nbytes` must be a multiple of the granularity.

        All of it is allocated when this returns, except on HOST, where a page is allocated when it is first written.
        """
        self._require_size(nbytes)
        return self._opened(self._create(nbytes, device), nbytes, device, imported=False)

    def import_(self, fd: int, nbytes: int, device: int) -> VmmHandle:
        """Turns a descriptor from `export`, of this or another process, into a handle. Owns `fd` from here on."""
        self._require_size(nbytes)
        return self._opened(self._import(fd, nbytes, device), nbytes, device, imported=True)

    def resident_bytes(self, handle: VmmHandle) -> int:
        """How much of an open handle of HOST memory is allocated so far."""
        return os.fstat(handle.native).st_blocks * 512

    def descriptor(self, handle: VmmHandle) -> int | None:
        """The descriptor that the handle keeps open itself, for others to copy; None where it keeps none."""
        return None

    def export(self, handle: VmmHandle) -> int:
        """A descriptor of the memory; the caller closes it.

        Raises VmmError for imported memory, which neither CUDA nor CANN exports again.
        """
        self._require_open(handle)
        if handle.imported:
            raise VmmError(
                "an imported handle cannot be exported again", hint="Pass on a copy of the descriptor it came from."
            )
        return self._export(handle)

    def map(self, va: int, handle: VmmHandle) -> None:
        """Puts all of `handle` at address `va`, inside one reservation and over nothing else."""
        self._require_open(handle)
        with self._books():
            reservation = self._reservation_of(va, handle.nbytes)
            if va % self.granularity:
                raise VmmError(f"address {va:#x} is not a multiple of the granularity {self.granularity}")
            if reservation.overlaps(va, handle.nbytes):
                raise VmmError(f"{_span(va, handle.nbytes)} is mapped already", hint="Unmap it first.")
            self._map(va, handle)
            bisect.insort(reservation.starts, va)
            reservation.handles[va] = handle
            handle.maps += 1

    def unmap(self, va: int, nbytes: int) -> None:
        """Takes one mapping away again: exactly the range that one `map` put there."""
        with self._books():
            reservation = self._reservation_of(va, nbytes)
            handle = reservation.handles.get(va)
            if handle is None or handle.nbytes != nbytes:
                raise VmmError(f"{_span(va, nbytes)} is not one mapping", hint="Unmap what was mapped, whole.")
            self._unmap(va, nbytes)
            reservation.starts.remove(va)
            del reservation.handles[va]
            handle.maps -= 1
        self._settle(handle)

    def copy(self, dst: int, src: int, nbytes: int) -> None:
        """Copies between two mapped ranges that do not overlap, and waits for it."""
        with self._books():
            for va in (dst, src):
                if not self._reservation_of(va, nbytes).covers(va, nbytes):
                    raise VmmError(f"{_span(va, nbytes)} is not mapped throughout", hint="Map it before copying.")
        self._copy(dst, src, nbytes)

    def close(self, handle: VmmHandle) -> None:
        """Gives the handle up; memory that is mapped somewhere lives on. Closing twice is an error."""
        self._require_open(handle)
        self._close(handle)
        with self._books():
            handle.is_open = False
            self._open_handles -= 1
        self._settle(handle)

    def usage(self) -> VmmUsage:
        """What this process holds through this backend now."""
        with self._books():
            mapped = [handle.nbytes for r in self._reservations.values() for handle in r.handles.values()]
            return VmmUsage(
                reserved_bytes=sum(r.va.nbytes for r in self._reservations.values()),
                mapped_bytes=sum(mapped),
                mappings=len(mapped),
                open_handles=self._open_handles,
            )

    def when_idle(self, action: Callable[[], None]) -> None:
        """Runs `action` now, or right after the call that this thread is in the middle of.

        For finalizers: the garbage collector may run them between any two lines of this class.
        """
        self._later.append(action)
        with self._books():
            pass

    # ---------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _books(self) -> Iterator[None]:
        with self._lock:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                idle = self._depth == 0
        while idle and self._later:
            try:
                action = self._later.popleft()
            except IndexError:  # another thread took it
                return
            action()

    def _opened(self, native: int, nbytes: int, device: int, *, imported: bool) -> VmmHandle:
        with self._books():
            self._open_handles += 1
        return VmmHandle(native=native, nbytes=nbytes, device=device, imported=imported)

    def _settle(self, handle: VmmHandle) -> None:
        with self._books():
            if handle.is_open or handle.maps or handle.on_free is None:
                return
            on_free, handle.on_free = handle.on_free, None
        on_free()

    def _reservation_of(self, va: int, nbytes: int) -> _Reservation:
        index = bisect.bisect_right(self._bases, va) - 1
        if index >= 0:
            reservation = self._reservations[self._bases[index]]
            if nbytes > 0 and va + nbytes <= reservation.va.end:
                return reservation
        raise VmmError(f"{_span(va, nbytes)} lies in no reserved address range of this process")

    def _require_size(self, nbytes: int) -> None:
        if nbytes <= 0 or nbytes % self.granularity:
            raise VmmError(
                f"{nbytes} bytes is not a positive multiple of the granularity {self.granularity}",
                hint="Use round_up().",
            )

    def _require_open(self, handle: VmmHandle) -> None:
        if not handle.is_open:
            raise VmmError(f"the handle of {handle.nbytes} bytes on device {handle.device} is closed")


def _span(va: int, nbytes: int) -> str:
    return f"[{va:#x}, {va + nbytes:#x})"
