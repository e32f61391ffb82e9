"""How much of a file the kernel holds in memory: what was read of it, by whatever way, since it was dropped."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def drop(path: Path) -> None:
    """Write the file out and forget its pages. A file system that lives in memory keeps them."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident(path: Path) -> int:
    """Bytes of the file that are in memory, read-ahead included (mincore(2))."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    # A private mapping may be written to, so that ctypes can tell its address; nothing is.
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        view = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(size), found)
        error = ctypes.get_errno()
        del view
    if failed:
        raise OSError(error, os.strerror(error), str(path))
    return sum(page & 1 for page in found) * mmap.PAGESIZE
