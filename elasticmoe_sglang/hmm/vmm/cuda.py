"""NVIDIA GPUs: the driver's virtual memory management behind the common interface.

What a process needs a CUDA context for, and what not (docs/adr/0004-hmm-without-a-context.md): creating, exporting and
importing physical memory, reserving addresses and mapping need none, so an HMM holds no context on any device. Copying
does; it uses the device's primary context, which is the one torch uses.

Access: a mapping may be used by the devices on which this process has a primary context, which in a rank is the rank's
own; before there is one, by the device the memory lies on. Memory of another device is reached over NVLink or PCIe.

Copies run on streams of the lowest priority in the process that pulls, beside its decoding.

CUDA does not survive a fork: a process that forks others must not have made this backend.

Device HOST is memory of no device, a memfd as the CPU backend makes it. It is mapped with mmap, not here.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from elasticmoe_sglang.errors import DriverUnsupported, VmmError
from elasticmoe_sglang.hmm.vmm import cuda_driver
from elasticmoe_sglang.hmm.vmm.base import VaRange, VmmBackend, VmmHandle
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from elasticmoe_sglang.wire.to_hmm import HOST


@dataclass(frozen=True, kw_only=True)
class _CopyLane:
    """A stream of the lowest priority and the event that says when its last copy is over."""

    stream: Any
    event: Any


@dataclass(kw_only=True)
class _Device:
    """A device on which this process copies."""

    context: Any
    idle_lanes: list[_CopyLane] = field(default_factory=list)


class CudaBackend(VmmBackend):
    """GPU memory through the driver. Works in any thread: the calling thread's context is put back after each call."""

    name: ClassVar[str] = "cuda"
    copy_chunk_bytes: ClassVar[int] = 1 << 30
    """Copies are queued in pieces of this size: waiting for one costs as long as copying tens of megabytes."""

    def __init__(self) -> None:
        super().__init__()
        self._driver = cuda_driver.load()
        self._host = CpuBackend()
        self._devices: dict[int, _Device] = {}
        flags = self._driver.api.CUmemAllocationGranularity_flags
        self._granularity = int(
            self._driver(
                "cuMemGetAllocationGranularity",
                self._properties(0),
                flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            )
        )

    @property
    def granularity(self) -> int:
        return self._granularity

    def torch_device(self, device: int) -> str:
        return f"cuda:{device}"

    def check(self, status: int, call: str) -> None:
        self._driver.check(status, call)

    def device_count(self) -> int:
        """GPUs this process may use."""
        return int(self._driver("cuDeviceGetCount"))

    def active_devices(self) -> list[int]:
        """Devices on which this process has a primary context; in the HMM none."""
        active = []
        for device in range(self.device_count()):
            _flags, is_active = self._driver("cuDevicePrimaryCtxGetState", self._driver("cuDeviceGet", device))
            if is_active:
                active.append(device)
        return active

    # Address space and physical memory ---------------------------------------------------------------------------

    def _reserve(self, nbytes: int) -> int:
        return int(self._driver("cuMemAddressReserve", nbytes, self._granularity, 0, 0))

    def _release_va(self, va: VaRange) -> None:
        self._driver("cuMemAddressFree", va.base, va.nbytes)

    def _create(self, nbytes: int, device: int) -> int:
        if device == HOST:
            return self._host._create(nbytes, device)
        return int(self._driver("cuMemCreate", nbytes, self._properties(device), 0))

    def _close(self, handle: VmmHandle) -> None:
        if handle.device == HOST:
            return self._host._close(handle)
        self._driver("cuMemRelease", handle.native)

    def _properties(self, device: int) -> Any:
        api = self._driver.api
        properties = api.CUmemAllocationProp()
        properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = device
        properties.requestedHandleTypes = self._shareable
        return properties

    @property
    def _shareable(self) -> Any:
        return self._driver.api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    # Mappings ----------------------------------------------------------------------------------------------------

    def _map(self, va: int, handle: VmmHandle) -> None:
        if handle.device == HOST:
            raise VmmError("host memory cannot lie in a GPU's address range", hint="Map its descriptor with mmap.")
        access = [self._access(user, handle.device) for user in self.active_devices() or [handle.device]]
        self._driver("cuMemMap", va, handle.nbytes, 0, handle.native, 0)
        try:
            self._driver("cuMemSetAccess", va, handle.nbytes, access, len(access))
        except VmmError:
            self._driver("cuMemUnmap", va, handle.nbytes)
            raise

    def _access(self, user: int, home: int) -> Any:
        """The right of `user`'s device to memory of `home`'s. Raises DriverUnsupported where nothing links them."""
        if user != home:
            devices = (self._driver("cuDeviceGet", user), self._driver("cuDeviceGet", home))
            if not self._driver("cuDeviceCanAccessPeer", *devices):
                raise DriverUnsupported(
                    f"GPU {user} cannot reach the memory of GPU {home}",
                    code=0,
                    hint="Ranks must run on GPUs that NVLink or PCIe peer access joins (`nvidia-smi topo -p2p rw`).",
                )
        api = self._driver.api
        access = api.CUmemAccessDesc()
        access.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = user
        access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return access

    def _unmap(self, va: int, nbytes: int) -> None:
        self._driver("cuMemUnmap", va, nbytes)

    # Between processes -------------------------------------------------------------------------------------------

    def _export(self, handle: VmmHandle) -> int:
        if handle.device == HOST:
            return self._host._export(handle)
        return int(self._driver("cuMemExportToShareableHandle", handle.native, self._shareable, 0))

    def _import(self, fd: int, nbytes: int, device: int) -> int:
        if device == HOST:
            return self._host._import(fd, nbytes, device)
        try:
            native = int(self._driver("cuMemImportFromShareableHandle", fd, self._shareable))
        finally:
            os.close(fd)
        home = int(self._driver("cuMemGetAllocationPropertiesFromHandle", native).location.id)
        if home != device:
            self._driver("cuMemRelease", native)
            raise VmmError(
                f"the memory announced as device {device}'s is device {home}'s here",
                hint="All processes of a server must see the same GPUs in the same order (CUDA_VISIBLE_DEVICES).",
            )
        return native

    # Copies ------------------------------------------------------------------------------------------------------

    def _copy(self, dst: int, src: int, nbytes: int) -> None:
        with self._lane(self._device_for(dst)) as lane:
            self._driver("cuMemcpyDtoDAsync", dst, src, nbytes, lane.stream)
            self._driver("cuEventRecord", lane.event, lane.stream)
            self._driver("cuEventSynchronize", lane.event)  # gives up the interpreter's lock

    def _device_for(self, va: int) -> int:
        """The device whose context copies to `va`: one that may use it (see `_map`)."""
        with self._books():
            reservation = self._reservation_of(va, 1)
            start = reservation.starts[bisect.bisect_right(reservation.starts, va) - 1]
            home = reservation.handles[start].device
        active = self.active_devices()
        return home if home in active or not active else active[0]

    @contextmanager
    def _lane(self, number: int) -> Iterator[_CopyLane]:
        """A lane of the device, which is the current one inside."""
        with self._books():
            device = self._devices.get(number)
            if device is None:
                context = self._driver("cuDevicePrimaryCtxRetain", self._driver("cuDeviceGet", number))
                device = self._devices[number] = _Device(context=context)
        self._driver("cuCtxPushCurrent", device.context)
        try:
            with self._books():
                lane = device.idle_lanes.pop() if device.idle_lanes else self._new_lane()
            try:
                yield lane
            finally:
                with self._books():
                    device.idle_lanes.append(lane)
        finally:
            self._driver("cuCtxPopCurrent")

    def _new_lane(self) -> _CopyLane:
        api = self._driver.api
        least, _greatest = self._driver("cuCtxGetStreamPriorityRange")
        stream = self._driver("cuStreamCreateWithPriority", int(api.CUstream_flags.CU_STREAM_NON_BLOCKING), least)
        event = self._driver("cuEventCreate", int(api.CUevent_flags.CU_EVENT_DISABLE_TIMING))
        return _CopyLane(stream=stream, event=event)
