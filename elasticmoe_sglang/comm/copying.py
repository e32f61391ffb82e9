"""Copying bytes between addresses.

Small copies keep the interpreter lock: giving it up costs more than the copy, and a busy Python thread may keep it for
its whole switch interval (5 ms). Large ones give it up.
"""

from __future__ import annotations

import ctypes

_LARGE = 256 << 10

_held = ctypes.PyDLL(None)
_memmove = _held.memmove
_memmove.restype = None
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memset = _held.memset
_memset.restype = None
_memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


def copy_bytes(target: int, source: int, nbytes: int) -> None:
    """memmove."""
    if nbytes < _LARGE:
        _memmove(target, source, nbytes)
    else:
        ctypes.memmove(target, source, nbytes)


def zero_bytes(target: int, nbytes: int) -> None:
    """memset to zero."""
    if nbytes < _LARGE:
        _memset(target, 0, nbytes)
    else:
        ctypes.memset(target, 0, nbytes)
