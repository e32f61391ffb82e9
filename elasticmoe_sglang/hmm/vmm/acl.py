"""CANN's runtime library `libascendcl.so` through ctypes: only the calls the Ascend memory backend makes.

Layouts and signatures are those of `acl/acl_rt.h` as shipped inside the torch_npu 2.13.0 wheel;
`tests/contract/test_ascend_headers.py` compiles them against that header. ctypes releases the GIL during a call.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from elasticmoe_sglang.errors import (
    BadDriverCall,
    DeviceFault,
    DriverError,
    DriverRefused,
    DriverUnsupported,
    OutOfDeviceMemory,
    VmmError,
)

LIBRARY = "libascendcl.so"

# Enumerators of acl_rt.h.
MEM_HANDLE_TYPE_NONE = 0
MEM_ALLOCATION_TYPE_PINNED = 0
HBM_MEM = 1
HBM_MEM_HUGE = 4
MEM_LOCATION_TYPE_DEVICE = 1
GRANULARITY_MINIMUM = 0
EXPORT_WITHOUT_PID_VALIDATION = 1
RESERVE_HUGE_PAGES = 1
MEMCPY_DEVICE_TO_DEVICE = 3

SUCCESS = 0
REPEAT_INITIALIZE = 100002
CONTEXT_NULL = 107002


class MemLocation(ctypes.Structure):
    """aclrtMemLocation, 8 bytes: the id comes before the type."""

    _fields_ = (("id", ctypes.c_uint32), ("type", ctypes.c_int))


class PhysicalMemProp(ctypes.Structure):
    """aclrtPhysicalMemProp, 32 bytes."""

    _fields_ = (
        ("handleType", ctypes.c_int),
        ("allocationType", ctypes.c_int),
        ("memAttr", ctypes.c_int),
        ("location", MemLocation),
        ("reserve", ctypes.c_uint64),
    )


_ptr, _size, _i32, _u32, _u64 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_uint32, ctypes.c_uint64
_int = ctypes.c_int
_out = ctypes.POINTER

# Every one returns aclError (int); the header test declares each with exactly these types.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "aclInit": (ctypes.c_char_p,),
    "aclrtSetDevice": (_i32,),
    "aclrtResetDevice": (_i32,),
    "aclrtGetDevice": (_out(_i32),),
    "aclrtGetDeviceCount": (_out(_u32),),
    "aclrtGetMemInfo": (_int, _out(_size), _out(_size)),
    "aclrtGetCurrentContext": (_out(_ptr),),
    "aclrtSetCurrentContext": (_ptr,),
    "aclrtDeviceCanAccessPeer": (_out(_i32), _i32, _i32),
    "aclrtDeviceEnablePeerAccess": (_i32, _u32),
    "aclrtMemGetAllocationGranularity": (_out(PhysicalMemProp), _int, _out(_size)),
    "aclrtReserveMemAddress": (_out(_ptr), _size, _size, _ptr, _u64),
    "aclrtReleaseMemAddress": (_ptr,),
    "aclrtMallocPhysical": (_out(_ptr), _size, _out(PhysicalMemProp), _u64),
    "aclrtFreePhysical": (_ptr,),
    "aclrtMapMem": (_ptr, _size, _size, _ptr, _u64),
    "aclrtUnmapMem": (_ptr,),
    "aclrtMemExportToShareableHandle": (_ptr, _int, _u64, _out(_u64)),
    "aclrtMemImportFromShareableHandle": (_u64, _i32, _out(_ptr)),
    "aclrtCreateStream": (_out(_ptr),),
    "aclrtDestroyStream": (_ptr,),
    "aclrtSynchronizeStream": (_ptr,),
    "aclrtMemcpyAsync": (_ptr, _size, _ptr, _size, _int, _ptr),
    "aclrtMemset": (_ptr, _size, _i32, _size),
}


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """One error code: the header's name for it, what it says, and which exception it becomes."""

    name: str
    text: str
    error: type[DriverError]
    hint: str | None = None


def _rows(error: type[DriverError], rows: Sequence[tuple[int, str, str, str | None]]) -> dict[int, Meaning]:
    return {code: Meaning(name=name, text=text, error=error, hint=hint) for code, name, text, hint in rows}


_RULES = "The call breaks one of CANN's rules for virtual memory; see docs/hardware.md."
CANN_HINT = "Source CANN's set_env.sh, and check `npu-smi info`."
_DEVICE = "Check `npu-smi info` and the device log; the device may need a reset by its administrator."

# Codes a memory call can answer with (acl_base_rt.h and error_codes/rt_error_codes.h). Others are named by their range.
CODES: dict[int, Meaning] = {
    **_rows(
        BadDriverCall,
        [
            (100000, "ACL_ERROR_INVALID_PARAM", "a parameter is invalid", _RULES),
            (100001, "ACL_ERROR_UNINITIALIZE", "ACL is not initialised in this process", None),
            (107000, "ACL_ERROR_RT_PARAM_INVALID", "a parameter is invalid", _RULES),
            (107001, "ACL_ERROR_RT_INVALID_DEVICEID", "the device id is invalid", "Check ASCEND_RT_VISIBLE_DEVICES."),
            (107002, "ACL_ERROR_RT_CONTEXT_NULL", "the thread has no device context", None),
            (107008, "ACL_ERROR_RT_ADDR_UNALIGNED", "an address or size is not aligned", _RULES),
            (107016, "ACL_ERROR_RT_INVALID_MEMORY_TYPE", "the memory type is invalid", _RULES),
            (107017, "ACL_ERROR_RT_INVALID_HANDLE", "the handle is invalid", "It was freed, or is another process's."),
            (200003, "ACL_ERROR_MEMORY_ADDRESS_UNALIGNED", "an address is not aligned", _RULES),
            (200005, "ACL_ERROR_INVALID_RESOURCE_HANDLE", "the handle is invalid", None),
        ],
    ),
    **_rows(
        OutOfDeviceMemory,
        [
            (200000, "ACL_ERROR_BAD_ALLOC", "host memory ran out", None),
            (207001, "ACL_ERROR_RT_MEMORY_ALLOCATION", "the device is out of memory", "Lower the HMM's budget."),
            (207005, "ACL_ERROR_RT_RESOURCE_ALLOC_FAIL", "a runtime resource ran out", None),
            (207018, "ACL_ERROR_RT_DEVICE_OOM", "the device is out of memory", "Lower the HMM's budget."),
        ],
    ),
    **_rows(
        DriverRefused,
        [(207006, "ACL_ERROR_RT_NO_PERMISSION", "permission denied", "Import in a process the exporter admitted.")],
    ),
    **_rows(
        DriverUnsupported,
        [
            (200001, "ACL_ERROR_API_NOT_SUPPORT", "the call is not supported", "Install CANN 8.1 or newer."),
            (200006, "ACL_ERROR_FEATURE_UNSUPPORTED", "the feature is not supported", "Install CANN 8.1 or newer."),
            (207000, "ACL_ERROR_RT_FEATURE_NOT_SUPPORT", "the feature is not supported on this device", None),
        ],
    ),
    **_rows(
        DeviceFault,
        [
            (207004, "ACL_ERROR_RT_NO_DEVICE", "there is no device", CANN_HINT),
            (500000, "ACL_ERROR_INTERNAL_ERROR", "CANN failed internally", _DEVICE),
            (507000, "ACL_ERROR_RT_INTERNAL_ERROR", "the runtime failed internally", _DEVICE),
            (507022, "ACL_ERROR_RT_IPC_ERROR", "communication between processes failed", _DEVICE),
            (507053, "ACL_ERROR_RT_DEVICE_MEM_ERROR", "device memory reported an error", _DEVICE),
            (507054, "ACL_ERROR_RT_HBM_MULTI_BIT_ECC_ERROR", "device memory has an uncorrectable error", _DEVICE),
            (507056, "ACL_ERROR_RT_LINK_ERROR", "a link between devices failed", _DEVICE),
            (
                507899,
                "ACL_ERROR_RT_DRV_INTERNAL_ERROR",
                "the driver failed internally",
                "For an import: the memory was freed, belongs to this very process, or its device has no peer access.",
            ),
        ],
    ),
}

_RANGES: tuple[tuple[range, type[DriverError], str], ...] = (
    (range(100000, 200000), BadDriverCall, "the call was wrong"),
    (range(200000, 300000), DriverUnsupported, "a resource or feature is missing"),
    (range(500000, 600000), DeviceFault, "the device, driver or runtime failed"),
)


def explain(code: int) -> Meaning:
    """What a non-zero aclError says; a code this project has no row for gets the meaning of its range."""
    if code in CODES:
        return CODES[code]
    for codes, error, text in _RANGES:
        if code in codes:
            return Meaning(name="aclError", text=text, error=error)
    return Meaning(name="aclError", text="an unknown failure", error=DriverError)


class Acl:
    """The library, with its signatures declared and every failure raised."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._calls: dict[str, Any] = {}
        for name, arguments in SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError as error:
                raise DriverUnsupported(
                    f"{LIBRARY} has no {name}", code=0, hint="Install CANN 8.1 or newer."
                ) from error
            function.argtypes = list(arguments)
            function.restype = ctypes.c_int
            self._calls[name] = function
        self._recent = library.aclGetRecentErrMsg
        self._recent.argtypes, self._recent.restype = [], ctypes.c_char_p
        self._soc_name = library.aclrtGetSocName
        self._soc_name.argtypes, self._soc_name.restype = [], ctypes.c_char_p

    def status(self, name: str, *arguments: Any) -> int:
        """The call's aclError, for the few places where a failure is an answer."""
        return int(self._calls[name](*arguments))

    def __call__(self, name: str, *arguments: Any) -> None:
        self.check(self.status(name, *arguments), name)

    def soc_name(self) -> str:
        """The chip, such as "Ascend910B3"; empty when the runtime does not say. Wants a device context."""
        name = self._soc_name()
        return name.decode(errors="replace") if name else ""

    def check(self, status: int, call: str) -> None:
        """Raises the exception that the code's meaning stands for."""
        if status == SUCCESS:
            return
        meaning = explain(status)
        said = self._recent()
        detail = f" [{said.decode(errors='replace').strip()}]" if said else ""
        raise meaning.error(
            f"{call} failed: {meaning.text} ({meaning.name} {status}){detail}", code=status, hint=meaning.hint
        )


@functools.cache
def load() -> Acl:
    """Loads and initialises CANN's runtime. Raises VmmError where it is not installed."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise VmmError(f"{LIBRARY} cannot be loaded: {error}", hint=CANN_HINT) from error
    acl = Acl(library)
    # torch_npu may have initialised ACL in this process already; that answer is as good as success.
    status = acl.status("aclInit", None)
    if status != REPEAT_INITIALIZE:
        acl.check(status, "aclInit")
    return acl
