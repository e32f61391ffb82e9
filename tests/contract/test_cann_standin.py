"""The stand-in keeps CANN's documented rules: each is broken here, and the call answers with the code for it.

Sources: CANN's API reference, aclrtReserveMemAddress (aclcppdevg_03_0114), aclrtMallocPhysical (_0112), aclrtMapMem
(_0116), aclrtMemSetPidToShareableHandle (_0120), aclrtMemImportFromShareableHandle (_0121), aclrtMemAttr (_1398). It
names no codes; the ones asserted are those whose text in rt_error_codes.h describes the failure.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from elasticmoe_sglang.errors import BadDriverCall, DeviceFault, DriverRefused, DriverUnsupported, OutOfDeviceMemory
from elasticmoe_sglang.hmm.vmm.acl import HBM_MEM_HUGE, Acl, MemLocation, PhysicalMemProp
from tests.helpers import cann, cann_standin

pytestmark = pytest.mark.toolchain

M = 2 << 20
PARAM, DEVICE_ID, CONTEXT, UNALIGNED, MEMORY_TYPE, HANDLE = 107000, 107001, 107002, 107008, 107016, 107017
OUT_OF_MEMORY, UNSUPPORTED, NO_PERMISSION, DRIVER = 207001, 207000, 207006, 507899


class Driver:
    """The raw calls, and what was taken, so that a test can leave nothing behind."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.acl = Acl(library)
        self.ranges: list[int] = []
        self.handles: list[int] = []
        self.mapped: list[int] = []

    def reserve(self, nbytes: int, flags: int = 1) -> int:
        base = ctypes.c_void_p()
        self.acl("aclrtReserveMemAddress", base, nbytes, 0, None, flags)
        self.ranges.append(base.value)
        return base.value

    def malloc(self, nbytes: int = M, device: int = 0, **changes: int) -> int:
        fields = {"handleType": 0, "allocationType": 0, "memAttr": HBM_MEM_HUGE, "type": 1, "reserve": 0, **changes}
        location = MemLocation(device, fields.pop("type"))
        handle = ctypes.c_void_p()
        self.acl("aclrtMallocPhysical", handle, nbytes, PhysicalMemProp(location=location, **fields), 0)
        self.handles.append(handle.value)
        return handle.value

    def map(self, va: int, handle: int, nbytes: int = M, offset: int = 0, flags: int = 0) -> None:
        self.acl("aclrtMapMem", va, nbytes, offset, handle, flags)
        self.mapped.append(va)

    def unmap(self, va: int) -> None:
        self.acl("aclrtUnmapMem", va)
        self.mapped.remove(va)

    def free(self, handle: int) -> None:
        self.acl("aclrtFreePhysical", handle)
        self.handles.remove(handle)

    def export(self, handle: int, flags: int = 1) -> int:
        number = ctypes.c_uint64()
        self.acl("aclrtMemExportToShareableHandle", handle, 0, flags, number)
        return number.value

    def clear(self) -> None:
        for va in list(self.mapped):
            self.unmap(va)
        for handle in list(self.handles):
            self.free(handle)
        for base in self.ranges:
            self.acl("aclrtReleaseMemAddress", base)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    library = cann.standin_or_skip()
    monkeypatch.setenv("CANN_STANDIN_DEVICES", "4")
    monkeypatch.setenv("CANN_STANDIN_HBM_BYTES", str(16 * M))
    driver = Driver(library)
    driver.acl("aclrtSetDevice", 0)
    yield driver
    driver.acl("aclrtSetDevice", 0)
    driver.clear()


def code_of(call: Callable[[], object], error: type[Exception]) -> int:
    with pytest.raises(error) as caught:
        call()
    return caught.value.code


def importer(number: int, device: int = 0, then: str = "") -> str:
    """Imports in another process; returns what it printed: 0 or the error code, then what `then` prints."""
    program = f"""
import ctypes
acl = ctypes.CDLL("libascendcl.so"); M = 2 << 20; P = ctypes.c_void_p
handle, base = P(), P()
acl.aclrtSetDevice({device})
print(acl.aclrtMemImportFromShareableHandle(ctypes.c_uint64({number}), {device}, ctypes.byref(handle)))
acl.aclrtReserveMemAddress(ctypes.byref(base), ctypes.c_size_t(8 * M), ctypes.c_size_t(0), P(), ctypes.c_uint64(1))
def at(slot): return P(base.value + slot * M)
def map_(slot, h): return acl.aclrtMapMem(at(slot), ctypes.c_size_t(M), ctypes.c_size_t(0), h, ctypes.c_uint64(0))
{then}
"""
    environment = cann_standin.environment(devices=4, hbm_bytes=16 * M)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().replace("\n", " ")


def test_the_documented_order_works(driver: Driver) -> None:
    base, handle = driver.reserve(8 * M), driver.malloc()
    driver.map(base + 3 * M, handle)
    ctypes.memset(base + 3 * M, 7, M)
    driver.unmap(base + 3 * M)
    driver.map(base, handle)
    assert ctypes.string_at(base + M - 1, 1) == b"\x07"  # the physical page moved, its content with it


def test_no_context(driver: Driver) -> None:
    driver.acl("aclrtSetDevice", 0)
    driver.library.aclrtResetDevice(0)
    assert code_of(lambda: driver.reserve(M), BadDriverCall) == CONTEXT


@pytest.mark.parametrize("arguments", [(0, 0, None, 1), (M, M, None, 1), (M, 0, 16 << 40, 1), (M, 0, None, 2)])
def test_reserve_arguments(driver: Driver, arguments: tuple[int, int, int | None, int]) -> None:
    base = ctypes.c_void_p()
    assert code_of(lambda: driver.acl("aclrtReserveMemAddress", base, *arguments), BadDriverCall) in (100000, PARAM)


def test_size_is_a_multiple_of_the_page(driver: Driver) -> None:
    assert code_of(lambda: driver.malloc(M + 4096), BadDriverCall) == UNALIGNED
    assert code_of(lambda: driver.malloc(M, memAttr=10), BadDriverCall) == UNALIGNED  # HUGE1G wants 1 GiB


@pytest.mark.parametrize("change", [{"handleType": 2}, {"allocationType": 1}, {"type": 0}, {"reserve": 1}])
def test_property_fields_are_fixed(driver: Driver, change: dict[str, int]) -> None:
    assert code_of(lambda: driver.malloc(**change), BadDriverCall) == PARAM


def test_device_must_exist(driver: Driver) -> None:
    assert code_of(lambda: driver.malloc(device=4), BadDriverCall) == DEVICE_ID


def test_capacity(driver: Driver) -> None:
    assert code_of(lambda: driver.malloc(17 * M), OutOfDeviceMemory) == OUT_OF_MEMORY
    whole = driver.malloc(16 * M)
    assert code_of(lambda: driver.malloc(), OutOfDeviceMemory) == OUT_OF_MEMORY
    driver.malloc(device=1)
    driver.free(whole)
    driver.malloc()


@pytest.mark.parametrize(("offset", "nbytes", "flags"), [(M, M, 0), (0, M, 0), (0, 4 * M, 0), (0, 2 * M, 1)])
def test_map_takes_the_whole_handle_from_offset_0(driver: Driver, offset: int, nbytes: int, flags: int) -> None:
    base, handle = driver.reserve(8 * M), driver.malloc(2 * M)
    assert code_of(lambda: driver.map(base, handle, nbytes, offset, flags), BadDriverCall) == PARAM


def test_map_address(driver: Driver) -> None:
    base, one, two = driver.reserve(4 * M), driver.malloc(), driver.malloc()
    assert code_of(lambda: driver.map(base + 4096, one), BadDriverCall) == UNALIGNED
    assert code_of(lambda: driver.map(base + 4 * M, one), BadDriverCall) == PARAM  # past the end
    driver.map(base, one)
    assert code_of(lambda: driver.map(base, two), BadDriverCall) == PARAM  # taken


def test_one_reservation_one_device(driver: Driver) -> None:
    base, here, there = driver.reserve(4 * M), driver.malloc(device=0), driver.malloc(device=1)
    driver.map(base, here)
    assert code_of(lambda: driver.map(base + M, there), BadDriverCall) == DEVICE_ID
    driver.unmap(base)
    driver.map(base + M, there)  # an empty one may change hands


def test_huge_pages_need_a_huge_page_reservation(driver: Driver) -> None:
    base, handle = driver.reserve(M, flags=0), driver.malloc()
    assert code_of(lambda: driver.map(base, handle), BadDriverCall) == MEMORY_TYPE


def test_order_of_giving_back(driver: Driver) -> None:
    base, handle = driver.reserve(M), driver.malloc()
    driver.map(base, handle)
    assert code_of(lambda: driver.free(handle), BadDriverCall) == PARAM
    assert code_of(lambda: driver.acl("aclrtReleaseMemAddress", base), BadDriverCall) == PARAM
    driver.unmap(base)
    assert code_of(lambda: driver.acl("aclrtUnmapMem", base), BadDriverCall) == PARAM
    driver.free(handle)
    assert code_of(lambda: driver.acl("aclrtFreePhysical", handle), BadDriverCall) == HANDLE


def test_one_export_a_handle(driver: Driver) -> None:
    handle = driver.malloc()
    driver.export(handle)
    assert code_of(lambda: driver.export(handle), BadDriverCall) == PARAM


def test_no_import_in_the_exporting_process(driver: Driver) -> None:
    number, handle = driver.export(driver.malloc()), ctypes.c_void_p()
    assert code_of(lambda: driver.acl("aclrtMemImportFromShareableHandle", number, 0, handle), DeviceFault) == DRIVER


def test_an_import_shares_the_pages(driver: Driver) -> None:
    base, handle = driver.reserve(M), driver.malloc()
    driver.map(base, handle)
    ctypes.memmove(base, b"here", 4)
    write = 'print(map_(0, handle), ctypes.string_at(at(0), 4).decode()); ctypes.memmove(at(0), b"back", 4)'
    assert importer(driver.export(handle), then=write) == "0 0 here"
    assert ctypes.string_at(base, 4) == b"back"


def test_only_admitted_processes_import(driver: Driver) -> None:
    handle = driver.malloc()
    number = driver.export(handle, flags=0)
    assert importer(number).startswith(str(NO_PERMISSION))
    pids = (ctypes.c_int32 * 1)(1)
    assert driver.library.aclrtMemSetPidToShareableHandle(ctypes.c_uint64(number), pids, ctypes.c_size_t(1)) == 0
    assert importer(number).startswith(str(NO_PERMISSION))
    assert issubclass(DriverRefused, Exception)
    with pytest.raises(DriverRefused):
        driver.acl.check(NO_PERMISSION, "aclrtMemImportFromShareableHandle")


def test_only_one_import_a_process(driver: Driver) -> None:
    again = "other = P(); print(acl.aclrtMemImportFromShareableHandle(ctypes.c_uint64({}), 0, ctypes.byref(other)))"
    number = driver.export(driver.malloc())
    assert importer(number, then=again.format(number)) == f"0 {PARAM}"


def test_no_import_of_freed_memory(driver: Driver) -> None:
    handle = driver.malloc()
    number = driver.export(handle)
    driver.free(handle)
    assert importer(number).startswith(str(DRIVER))


def test_no_local_and_imported_pages_in_one_reservation(driver: Driver) -> None:
    mix = """
prop = (ctypes.c_uint32 * 8)(0, 0, 4, 0, 1, 0, 0, 0); local = P()
print(acl.aclrtMallocPhysical(ctypes.byref(local), ctypes.c_size_t(M), prop, ctypes.c_uint64(0)))
print(map_(0, handle), map_(1, local))
"""
    assert importer(driver.export(driver.malloc()), then=mix) == f"0 0 0 {PARAM}"


def test_mapping_another_devices_pages_needs_one_way_peer_access(driver: Driver) -> None:
    number = driver.export(driver.malloc(device=1))
    reverse = "acl.aclrtSetDevice(1); acl.aclrtDeviceEnablePeerAccess(0, 0); acl.aclrtSetDevice(0)\n"
    right = "acl.aclrtDeviceEnablePeerAccess(1, 0)\n"
    assert importer(number, device=0, then=reverse + "print(map_(0, handle))") == f"0 {DRIVER}"
    assert importer(number, device=0, then=right + "print(map_(0, handle))") == "0 0"


def test_copies_between_devices(driver: Driver) -> None:
    here, there = driver.reserve(M), driver.reserve(M)
    driver.map(here, driver.malloc(device=0))
    driver.map(there, driver.malloc(device=2))
    copy = ("aclrtMemcpyAsync", here, M, there, M, 3, None)
    assert code_of(lambda: driver.acl(*copy), DeviceFault) == DRIVER  # peer access is off
    driver.acl("aclrtDeviceEnablePeerAccess", 2, 0)
    driver.acl(*copy)
    synchronous = driver.library.aclrtMemcpy
    synchronous.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    assert synchronous(here, M, there, M, 3) == UNSUPPORTED  # reserved addresses: the asynchronous call only
    driver.acl("aclrtSetDevice", 2)
    assert code_of(lambda: driver.acl(*copy), DeviceFault) == DRIVER  # the other way was never enabled


def test_a_copy_stays_in_mapped_memory(driver: Driver) -> None:
    base = driver.reserve(4 * M)
    driver.map(base, driver.malloc())
    copy = ("aclrtMemcpyAsync", base, 2 * M, base, 2 * M, 3, None)
    assert code_of(lambda: driver.acl(*copy), BadDriverCall) == PARAM


def test_compute_entries_fail(driver: Driver) -> None:
    library = driver.library
    run = ["aclrtBinaryLoadFromData", "aclrtBinaryGetFunction", "aclrtGetFunctionAddr", "aclrtEventElapsedTime"]
    private = ["rtKernelLaunch", "rtFunctionRegister", "rtDevBinaryRegister", "rtGetC2cCtrlAddr"]
    nothing = [ctypes.c_void_p()] * 6
    for name in [*run, *private, "aclmdlInitDump", "aclmdlSetDump", "aclmdlFinalizeDump", "aclrtLaunchKernel"]:
        assert getattr(library, name)(*nothing) == UNSUPPORTED, name
    for name in ("aclopCompileAndExecute", "aclopCompileAndExecuteV2"):
        assert getattr(library, name)(ctypes.c_char_p(b"Add"), *nothing, *nothing) == UNSUPPORTED, name
    with pytest.raises(DriverUnsupported, match="does not compute"):
        driver.acl.check(library.rtKernelLaunch(), "rtKernelLaunch")
