"""Ascend NPUs: CANN's virtual-memory calls behind the common interface.

CANN's API reference (aclrtReserveMemAddress ... aclrtMemImportFromShareableHandle) sets rules that CUDA does not, and
each shapes something here:

- A mapping covers a whole allocation from offset 0: `map` of the base class has no other form.
- One reservation holds pages of one device, and either local or imported ones, never both: checked before the driver
  is asked, because its answer is the same code for every wrong argument.
- An allocation is exported once: the shareable number is kept, and every `export` hands out the same one.
- An importer may import an allocation once and never its own: imports are counted by shareable number, and a process
  that gets its own export back gets its own handle back.
- Physical memory is freed after it is unmapped: `close` of a mapped handle frees at the last `unmap`.
- Peer access is one-way: enabled from the device that copies to the device it copies from, before the first copy.
  Between two devices only aclrtMemcpyAsync may touch reserved addresses.

A shareable number is 64 bits, not a descriptor. `export` therefore writes it into a sealed memfd and passes that, so
that the same SCM_RIGHTS socket carries every backend's handles. Numbers are exported without CANN's list of admitted
processes: who gets one is decided by that socket, which checks the peer's user.

ACL does not survive a fork: a process that forks others must not have made this backend.

Device HOST is memory of no device, a memfd as the CPU backend makes it. It is mapped with mmap, not here: ACL's address
ranges hold device pages.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from elasticmoe_sglang.errors import DriverError, VmmError
from elasticmoe_sglang.hmm.vmm import acl as _acl
from elasticmoe_sglang.hmm.vmm.base import VaRange, VmmBackend, VmmHandle
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from elasticmoe_sglang.wire.to_hmm import HOST

if TYPE_CHECKING:
    import torch

_TOKEN = struct.Struct("<8sQQiI")  # magic, shareable number, bytes, device, exporting process
_MAGIC = b"EMoEnpu1"
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034  # <linux/fcntl.h>; Python 3.10 does not name them
_ALL_SEALS = 0x1 | 0x2 | 0x4 | 0x8  # seal, shrink, grow, write


@dataclass(kw_only=True)
class _Physical:
    """One driver handle: how many of our handles and mappings refer to it."""

    nbytes: int
    device: int
    imported_as: int | None  # its shareable number when it came from another process
    handles: int = 1
    mappings: int = 0
    token: int | None = None  # descriptor of the exported token


@dataclass(kw_only=True)
class _Binding:
    """What CANN ties a reservation to while anything is mapped in it."""

    device: int
    imported: bool
    mappings: int


class AscendBackend(VmmBackend):
    """NPU memory through ACL. Works in any thread: the calling thread's context is put back after each call."""

    name: ClassVar[str] = "npu"

    def __init__(self) -> None:
        super().__init__()
        self._acl = _acl.load()
        self._host = CpuBackend()
        self._physical: dict[int, _Physical] = {}
        self._by_number: dict[int, int] = {}  # shareable number -> driver handle, exports and imports
        self._bindings: dict[int, _Binding] = {}  # reservation base -> what it is tied to
        self._peers: set[tuple[int, int]] = set()
        self._streams: dict[int, list[int]] = {}
        with self._on_any():  # a context takes memory of its device: none on device 0 for a worker of another one
            size = ctypes.c_size_t()
            self._acl("aclrtMemGetAllocationGranularity", _property(0), _acl.GRANULARITY_MINIMUM, size)
        self._granularity = size.value

    @property
    def granularity(self) -> int:
        return self._granularity

    def torch_device(self, device: int) -> str:
        return f"npu:{device}"

    def check(self, status: int, call: str) -> None:
        self._acl.check(status, call)

    def storage(self, va: int, nbytes: int, device: int) -> torch.UntypedStorage:
        """A storage over [va, va + nbytes), for `torch.empty(0, ...).set_(storage, ...)`. It owns nothing: the range
        must stay mapped wherever the tensor is used. Needs torch_npu, whose twin of torch's constructor makes it."""
        import torch
        import torch_npu

        made: torch.UntypedStorage = torch_npu._C._construct_storage_from_data_pointer(
            va, torch.device(self.torch_device(device)), nbytes
        )
        return made

    def device_count(self) -> int:
        """NPUs this process may use."""
        count = ctypes.c_uint32()
        self._acl("aclrtGetDeviceCount", count)
        return count.value

    # Address space ---------------------------------------------------------------------------------------------

    def _reserve(self, nbytes: int) -> int:
        base = ctypes.c_void_p()
        with self._on_any():
            self._acl("aclrtReserveMemAddress", base, nbytes, 0, None, _acl.RESERVE_HUGE_PAGES)
        assert base.value is not None
        return base.value

    def _release_va(self, va: VaRange) -> None:
        with self._on_any():
            self._acl("aclrtReleaseMemAddress", va.base)

    # Physical memory -------------------------------------------------------------------------------------------

    def _create(self, nbytes: int, device: int) -> int:
        if device == HOST:
            return self._host._create(nbytes, device)
        handle = ctypes.c_void_p()
        with self._on(device):
            self._acl("aclrtMallocPhysical", handle, nbytes, _property(device), 0)
            assert handle.value is not None
            try:
                self._zero(handle.value, nbytes)
            except VmmError:
                self._acl("aclrtFreePhysical", handle)
                raise
        with self._books():
            self._physical[handle.value] = _Physical(nbytes=nbytes, device=device, imported_as=None)
        return handle.value

    def _zero(self, native: int, nbytes: int) -> None:
        """New pages hold what the last owner left there; they are cleared through a mapping of their own."""
        base = self._reserve(nbytes)
        try:
            self._acl("aclrtMapMem", base, nbytes, 0, native, 0)
            try:
                self._acl("aclrtMemset", base, nbytes, 0, nbytes)
            finally:
                self._acl("aclrtUnmapMem", base)
        finally:
            self._acl("aclrtReleaseMemAddress", base)

    def _close(self, handle: VmmHandle) -> None:
        if handle.device == HOST:
            return self._host._close(handle)
        with self._books():
            self._physical[handle.native].handles -= 1
            self._free_if_unused(handle.native)

    def _free_if_unused(self, native: int) -> None:
        physical = self._physical[native]
        if physical.handles or physical.mappings:
            return
        del self._physical[native]
        self._by_number = {number: owner for number, owner in self._by_number.items() if owner != native}
        if physical.token is not None:
            os.close(physical.token)
        with self._on(physical.device):
            self._acl("aclrtFreePhysical", native)

    # Mappings --------------------------------------------------------------------------------------------------

    def _map(self, va: int, handle: VmmHandle) -> None:
        if handle.device == HOST:
            raise VmmError("host memory cannot lie in an NPU's address range", hint="Map its descriptor with mmap.")
        physical = self._physical[handle.native]
        imported = physical.imported_as is not None
        base = self._reservation_of(va, handle.nbytes).va.base
        binding = self._bindings.get(base)
        if binding is None:
            binding = _Binding(device=physical.device, imported=imported, mappings=0)
        elif binding.device != physical.device:
            raise VmmError(
                f"address range {base:#x} holds pages of device {binding.device}, these are device {physical.device}'s",
                hint="Ascend ties an address range to one device: reserve another one.",
            )
        elif binding.imported != imported:
            raise VmmError(
                f"address range {base:#x} holds {'imported' if binding.imported else 'local'} pages only",
                hint="Ascend does not mix local and imported pages in one address range: reserve another one.",
            )
        with self._on(physical.device):
            self._acl("aclrtMapMem", va, handle.nbytes, 0, handle.native, 0)
        binding.mappings += 1
        self._bindings[base] = binding
        physical.mappings += 1

    def _unmap(self, va: int, nbytes: int) -> None:
        reservation = self._reservation_of(va, nbytes)
        native = reservation.handles[va].native
        physical = self._physical[native]
        with self._on(physical.device):
            self._acl("aclrtUnmapMem", va)
        binding = self._bindings[reservation.va.base]
        binding.mappings -= 1
        if not binding.mappings:
            del self._bindings[reservation.va.base]
        physical.mappings -= 1
        self._free_if_unused(native)

    # Between processes -----------------------------------------------------------------------------------------

    def _export(self, handle: VmmHandle) -> int:
        if handle.device == HOST:
            return self._host._export(handle)
        with self._books():
            physical = self._physical[handle.native]
            if physical.token is None:
                number = ctypes.c_uint64()
                with self._on(physical.device):
                    self._acl(
                        "aclrtMemExportToShareableHandle",
                        handle.native,
                        _acl.MEM_HANDLE_TYPE_NONE,
                        _acl.EXPORT_WITHOUT_PID_VALIDATION,
                        number,
                    )
                physical.token = _write_token(number.value, physical.nbytes, physical.device)
                self._by_number[number.value] = handle.native
            return os.dup(physical.token)

    def _import(self, fd: int, nbytes: int, device: int) -> int:
        if device == HOST:
            return self._host._import(fd, nbytes, device)
        number, held, home, exporter = _read_token(fd)
        if held != nbytes or home != device:
            raise VmmError(
                f"the handle holds {held} bytes of device {home}, {nbytes} of device {device} were announced"
            )
        with self._books():
            native = self._by_number.get(number)
            if native is not None:
                self._physical[native].handles += 1
                return native
            if exporter == os.getpid():
                raise VmmError("the memory behind this handle was freed by this process")
            imported = ctypes.c_void_p()
            try:
                with self._on(device):
                    self._acl("aclrtMemImportFromShareableHandle", number, device, imported)
            except DriverError as error:
                if os.path.exists(f"/proc/{exporter}"):
                    raise
                raise VmmError(
                    f"process {exporter}, which owned this memory, has ended, and CANN lets nobody else import it",
                    hint="Start the server anew. Until then its ranks go on with what they have mapped.",
                ) from error
            assert imported.value is not None
            self._physical[imported.value] = _Physical(nbytes=nbytes, device=device, imported_as=number)
            self._by_number[number] = imported.value
            return imported.value

    # Copies ----------------------------------------------------------------------------------------------------

    def _copy(self, dst: int, src: int, nbytes: int) -> None:
        target, source = self._device_at(dst, nbytes), self._device_at(src, nbytes)
        with self._on(target):
            self._allow_peer(target, source)
            stream = self._take_stream(target)
            try:
                kind = _acl.MEMCPY_DEVICE_TO_DEVICE
                self._acl("aclrtMemcpyAsync", dst, nbytes, src, nbytes, kind, stream)
                self._acl("aclrtSynchronizeStream", stream)
            finally:
                with self._books():
                    self._streams[target].append(stream)

    def _device_at(self, va: int, nbytes: int) -> int:
        with self._books():
            return self._bindings[self._reservation_of(va, nbytes).va.base].device

    def _allow_peer(self, device: int, peer: int) -> None:
        """Lets the current device reach `peer`; once a process is enough, and doing it twice is an error of ACL's."""
        with self._books():
            if device == peer or (device, peer) in self._peers:
                return
            can = ctypes.c_int32()
            self._acl("aclrtDeviceCanAccessPeer", can, device, peer)
            if not can.value:
                raise VmmError(
                    f"NPU {device} cannot reach NPU {peer} directly",
                    hint="Ranks must run on NPUs that HCCS links (see `npu-smi info -t topo`).",
                )
            self._acl("aclrtDeviceEnablePeerAccess", peer, 0)
            self._peers.add((device, peer))

    def _take_stream(self, device: int) -> int:
        with self._books():
            idle = self._streams.setdefault(device, [])
            if idle:
                return idle.pop()
        stream = ctypes.c_void_p()
        self._acl("aclrtCreateStream", stream)
        assert stream.value is not None
        return stream.value

    # Contexts --------------------------------------------------------------------------------------------------

    @contextmanager
    def _on(self, device: int) -> Iterator[None]:
        """The calling thread's context is `device`'s inside, and what it was before afterwards."""
        before = ctypes.c_void_p()
        had_one = self._acl.status("aclrtGetCurrentContext", before) == _acl.SUCCESS
        self._acl("aclrtSetDevice", device)
        try:
            yield
        finally:
            if had_one:
                self._acl("aclrtSetCurrentContext", before)

    @contextmanager
    def _on_any(self) -> Iterator[None]:
        """Address space belongs to no device, but the calls want a context all the same."""
        context = ctypes.c_void_p()
        if self._acl.status("aclrtGetCurrentContext", context) == _acl.SUCCESS:
            yield
            return
        with self._on(0):
            yield


def _property(device: int) -> _acl.PhysicalMemProp:
    return _acl.PhysicalMemProp(
        _acl.MEM_HANDLE_TYPE_NONE,
        _acl.MEM_ALLOCATION_TYPE_PINNED,
        _acl.HBM_MEM_HUGE,
        _acl.MemLocation(device, _acl.MEM_LOCATION_TYPE_DEVICE),
        0,
    )


def _write_token(number: int, nbytes: int, device: int) -> int:
    fd = os.memfd_create("elasticmoe-npu-share", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, _TOKEN.pack(_MAGIC, number, nbytes, device, os.getpid()))
    fcntl.fcntl(fd, _F_ADD_SEALS, _ALL_SEALS)
    return fd


def _read_token(fd: int) -> tuple[int, int, int, int]:
    """Shareable number, bytes, device, exporting process. Closes `fd`."""
    try:
        sealed = fcntl.fcntl(fd, _F_GET_SEALS) & _ALL_SEALS == _ALL_SEALS
        data = os.pread(fd, _TOKEN.size + 1, 0)
    except OSError as error:
        raise VmmError(f"descriptor {fd} is no NPU memory handle: {error.strerror}") from error
    finally:
        os.close(fd)
    if len(data) != _TOKEN.size or not sealed or not data.startswith(_MAGIC):
        raise VmmError(f"descriptor {fd} is no NPU memory handle")
    _, number, nbytes, device, exporter = _TOKEN.unpack(data)
    return int(number), int(nbytes), int(device), int(exporter)
