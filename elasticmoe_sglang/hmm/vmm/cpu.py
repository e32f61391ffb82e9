"""Devices without an accelerator: memory is memfd, mapping is mmap over a reservation that nothing may touch.

Memory of a device is allocated when it is created, so that running out is an error of that call. Memory of no device
(HOST, the shared regions) is sparse: a page is allocated when a process first writes it. A region is made for the
largest messages that the largest server could send, and most of it is never touched. The price: when the machine is out
of memory at such a write, the writing process gets SIGBUS, or under a memory limit of its control group the kernel
kills a process of the group. That is the death of a rank, which the survivors handle like any other.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import ClassVar

from elasticmoe_sglang.errors import VmmError
from elasticmoe_sglang.hmm.vmm.base import VaRange, VmmBackend, VmmHandle
from elasticmoe_sglang.wire.to_hmm import HOST

# Constants that Python's mmap and fcntl modules do not name in 3.10; values of <linux/mman.h> and <linux/fcntl.h>.
_PROT_NONE = 0x0
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_POPULATE = 0x8000
_MAP_FAILED = ctypes.c_void_p(-1).value
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034
_F_SEAL_SEAL, _F_SEAL_SHRINK, _F_SEAL_GROW = 0x1, 0x2, 0x4
_FIXED_SIZE = _F_SEAL_SEAL | _F_SEAL_SHRINK | _F_SEAL_GROW

_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc.memmove.restype = ctypes.c_void_p


class CpuBackend(VmmBackend):
    """Host memory. A handle is a memfd whose size is sealed, so no client can cut it short under another one."""

    name: ClassVar[str] = "cpu"

    @property
    def granularity(self) -> int:
        return mmap.PAGESIZE

    def torch_device(self, device: int) -> str:
        return "cpu"

    def check(self, status: int, call: str) -> None:
        if status != 0:
            number = ctypes.get_errno()
            raise _failed(call, OSError(number, os.strerror(number)))

    def _reserve(self, nbytes: int) -> int:
        return self._mmap(None, nbytes, _PROT_NONE, _nothing_behind(), -1)

    def _release_va(self, va: VaRange) -> None:
        self.check(_libc.munmap(va.base, va.nbytes), "munmap")

    def _create(self, nbytes: int, device: int) -> int:
        try:
            fd = os.memfd_create(f"elasticmoe-{device}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise _failed("memfd_create", error) from error
        try:
            if device == HOST:
                os.ftruncate(fd, nbytes)
            else:
                os.posix_fallocate(fd, 0, nbytes)
            fcntl.fcntl(fd, _F_ADD_SEALS, _FIXED_SIZE)
        except OSError as error:
            os.close(fd)
            raise _failed(f"allocation of {nbytes} bytes", error) from error
        return fd

    def _map(self, va: int, handle: VmmHandle) -> None:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if handle.device != HOST:
            flags |= _MAP_POPULATE  # so that the first decode step that reads the memory has no page faults
        self._mmap(va, handle.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, handle.native)

    def _unmap(self, va: int, nbytes: int) -> None:
        self._mmap(va, nbytes, _PROT_NONE, _nothing_behind() | _MAP_FIXED, -1)

    def descriptor(self, handle: VmmHandle) -> int | None:
        self._require_open(handle)
        return int(handle.native)

    def _export(self, handle: VmmHandle) -> int:
        return os.dup(handle.native)

    def _import(self, fd: int, nbytes: int, device: int) -> int:
        try:
            size = os.fstat(fd).st_size
            sealed = fcntl.fcntl(fd, _F_GET_SEALS) & _FIXED_SIZE == _FIXED_SIZE
        except OSError as error:
            os.close(fd)
            raise _failed(f"import of descriptor {fd}", error) from error
        if size != nbytes or not sealed:
            os.close(fd)
            raise VmmError(
                f"the descriptor holds {size} bytes{'' if sealed else ' of changeable size'}, {nbytes} were announced"
            )
        return fd

    def _copy(self, dst: int, src: int, nbytes: int) -> None:
        _libc.memmove(dst, src, nbytes)

    def _close(self, handle: VmmHandle) -> None:
        os.close(handle.native)

    def _mmap(self, va: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
        base = _libc.mmap(va, nbytes, protection, flags, fd, 0)
        self.check(int(base == _MAP_FAILED), f"mmap of {nbytes} bytes")
        return int(base)


def _nothing_behind() -> int:
    return mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def _failed(call: str, error: OSError) -> VmmError:
    hints = {
        errno.ENOMEM: "The machine is out of memory or of mappings (vm.max_map_count): lower the budgets.",
        errno.ENOSPC: "The machine is out of memory: lower the budgets.",
        errno.EMFILE: "Too many open files: raise the limit (ulimit -n).",
    }
    return VmmError(f"{call} failed: {error.strerror}", hint=hints.get(error.errno or 0))
