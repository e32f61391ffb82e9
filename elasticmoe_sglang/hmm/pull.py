"""Copying a peer's memory into ours in the background: in chunks, at a limited rate, until told to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from elasticmoe_sglang.hmm.vmm.base import VmmBackend, VmmHandle

_NAP_S = 0.01
_LIMITED_CHUNK_S = 0.004
"""With a limit, a chunk is no longer than the limit's bytes of this time: a burst at full speed would slow serving."""
_LEAST_CHUNK_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class PullStats:
    """nbytes: copied; complete: False when it was told to stop before the end."""

    nbytes: int
    seconds: float
    chunks: int
    complete: bool

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / self.seconds if self.seconds else 0.0


def pull_bytes(
    backend: VmmBackend,
    destination: int,
    source: VmmHandle,
    nbytes: int,
    *,
    chunk_bytes: int | None = None,
    bytes_per_second: float | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> PullStats:
    """Copies the first `nbytes` of `source`, which stays the caller's, to the mapped address `destination`.

    The copy lets other threads run. It stops between two chunks as soon as `should_stop()` is true. Chunks are as
    large as the backend advises, where nothing else is asked for.
    """
    assert bytes_per_second is None or bytes_per_second > 0
    if chunk_bytes is None:
        chunk_bytes = backend.copy_chunk_bytes
        if bytes_per_second is not None:
            chunk_bytes = min(chunk_bytes, max(int(bytes_per_second * _LIMITED_CHUNK_S), _LEAST_CHUNK_BYTES))
    assert chunk_bytes > 0
    stop = should_stop or (lambda: False)
    started = time.monotonic()
    done = chunks = 0
    with _mapped(backend, source) as origin:
        while done < nbytes and not stop():
            size = min(chunk_bytes, nbytes - done)
            backend.copy(destination + done, origin + done, size)
            done += size
            chunks += 1
            if bytes_per_second is not None:  # after the last chunk too: the next pull follows at once
                _sleep_until(started + done / bytes_per_second, stop)
    return PullStats(nbytes=done, seconds=time.monotonic() - started, chunks=chunks, complete=done == nbytes)


@contextmanager
def _mapped(backend: VmmBackend, source: VmmHandle) -> Iterator[int]:
    # An address range of its own: one range may hold local or imported pages, never both (Ascend).
    window = backend.reserve(source.nbytes)
    try:
        backend.map(window.base, source)
        try:
            yield window.base
        finally:
            backend.unmap(window.base, source.nbytes)
    finally:
        backend.release_va(window)


def _sleep_until(moment: float, stop: Callable[[], bool]) -> None:
    while (left := moment - time.monotonic()) > 0 and not stop():
        time.sleep(min(left, _NAP_S))
