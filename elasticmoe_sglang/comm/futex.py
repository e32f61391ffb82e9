"""Sleeping on and waking through a 32-bit word of shared memory, by the futex system call.

Plain stores to the shared words come from Python's memoryview, which writes an aligned word in one instruction. On
x86-64 stores become visible in program order, so "write the data, then the flag" needs nothing more. `full_fence`
orders a store before a later load, which x86-64 does not do by itself; on machines with weaker ordering (aarch64)
`order_stores` is the same fence and costs about a microsecond, on x86-64 it does nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections.abc import Callable

_SYSCALL_NUMBERS = {"x86_64": 202, "aarch64": 98}
_MACHINE = platform.machine()
_FUTEX = _SYSCALL_NUMBERS.get(_MACHINE, 0)
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_FUTEX_WAKE_OP = 5
_ALL = 0x7FFFFFFF
# FUTEX_OP_ADD of 1 to the second word; the comparison (old value < -2048, never) wakes none who sleep on that.
_ADD_ONE = (1 << 28) | (2 << 24) | (1 << 12) | 0x800


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def _prototype(library: ctypes.CDLL) -> Callable[..., int]:
    call = library.syscall
    call.restype = ctypes.c_long
    call.argtypes = (
        ctypes.c_long,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_uint32,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_uint32,
    )
    return call


# A wait must let other Python threads run; a wake is too short for giving up the interpreter lock.
_wait_call = _prototype(ctypes.CDLL(None, use_errno=True))
_wake_call = _prototype(ctypes.PyDLL(None, use_errno=True))

_fence_word = ctypes.c_uint32(0)
_fence_address = ctypes.addressof(_fence_word)


def supported() -> bool:
    """Whether this machine's futex call number is known here."""
    return _FUTEX != 0


def wait(address: int, expected: int, timeout_s: float) -> bool:
    """Sleep while the word at `address` equals `expected`, at most `timeout_s` seconds.

    Returns False when the time ran out. True means woken, interrupted, or the word had changed already: look again.
    """
    seconds = int(timeout_s)
    limit = _Timespec(seconds, int((timeout_s - seconds) * 1e9))
    if _wait_call(_FUTEX, address, _FUTEX_WAIT, expected, ctypes.addressof(limit), None, 0) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EAGAIN, errno.EINTR):
        return True
    if code == errno.ETIMEDOUT:
        return False
    raise OSError(code, os.strerror(code))


def wake(address: int) -> None:
    """Wake all who sleep on the word at `address`."""
    _wake_call(_FUTEX, address, _FUTEX_WAKE, _ALL, None, None, 0)


def add_one_and_wake(address: int) -> None:
    """Add one to the word in one atomic step (done by the kernel, FUTEX_WAKE_OP), then wake all who sleep on it."""
    _wake_call(_FUTEX, address, _FUTEX_WAKE_OP, _ALL, None, address, _ADD_ONE)


def full_fence() -> None:
    """Make every earlier store visible before any later load: the kernel's wake path has a full memory barrier."""
    _wake_call(_FUTEX, _fence_address, _FUTEX_WAKE, 1, None, None, 0)


def _nothing() -> None:
    return


order_stores: Callable[[], None] = _nothing if _MACHINE == "x86_64" else full_fence
