"""What a client holds of the HMM's memory, kept so that it can be offered to another HMM when this one has ended.

A lease lasts until its handle is closed and unmapped. Until then the descriptor that it came with is kept as well, one
a handle: memory can be shared again from a descriptor only, not from a mapping.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence

import msgspec

from elasticmoe_sglang.hmm.client_link import HmmLink
from elasticmoe_sglang.wire import to_hmm
from elasticmoe_sglang.wire.seqpacket import MAX_FDS


class Lease:
    """One handle's lease: the block, the HMM (its link) that counts it, and the kept descriptor."""

    __slots__ = ("block", "fd", "link", "region_bytes")

    def __init__(self, block: to_hmm.Block, link: HmmLink, fd: int) -> None:
        self.block = block
        self.link = link
        self.fd = fd
        self.region_bytes: int | None = None


class LeaseBook:
    """All leases of one client. Thread-safe; `give_back` never waits, since finalizers call it."""

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}  # by descriptor
        self._returned: deque[Lease] = deque()
        self._busy = threading.Lock()

    def __len__(self) -> int:
        return len(self._leases)

    def take(self, block: to_hmm.Block, link: HmmLink, fd: int) -> Lease:
        """Notes a lease; `fd` is duplicated."""
        lease = Lease(block, link, os.dup(fd))
        self._leases[lease.fd] = lease
        return lease

    def release_blocks(self, lease: Lease) -> None:
        """The handle is closed and unmapped."""
        self._returned.append(lease)
        self._settle()

    def sealed(self, block_ids: Sequence[int]) -> None:
        """These blocks' contents are known to be complete."""
        wanted = set(block_ids)
        for lease in list(self._leases.values()):
            if lease.block.block_id in wanted:
                lease.block = msgspec.structs.replace(lease.block, sealed=True)

    def regions(self, block_id: int, nbytes: int) -> None:
        """This block is a region of so many bytes."""
        for lease in list(self._leases.values()):
            if lease.block.block_id == block_id:
                lease.region_bytes = nbytes

    def offer(self, link: HmmLink, model: to_hmm.ModelSpec | None, deadline: float) -> int:
        """Gives the HMM behind `link` whatever another one has left here; how many blocks it did not have yet."""
        new = 0
        with self._busy:  # nothing is closed meanwhile
            stale = [lease for lease in list(self._leases.values()) if lease.link is not link]
            for start in range(0, len(stale), MAX_FDS):
                batch = stale[start : start + MAX_FDS]
                offers = [to_hmm.Offer(block=lease.block, region_bytes=lease.region_bytes) for lease in batch]
                new += link.adopt(model, offers, [lease.fd for lease in batch], deadline)
                for lease in batch:
                    lease.link = link
        self._settle()
        return new

    def close(self) -> None:
        """Closes every kept descriptor; what is mapped stays mapped, and can no longer be offered to another HMM."""
        for lease in list(self._leases.values()):
            self.release_blocks(lease)

    def _settle(self) -> None:
        # A thread that finds the book busy leaves its lease to the one that has it, which checks again after release.
        while self._returned and self._busy.acquire(blocking=False):
            try:
                while self._returned:
                    self._end(self._returned.popleft())
            finally:
                self._busy.release()

    def _end(self, lease: Lease) -> None:
        if self._leases.get(lease.fd) is lease:
            del self._leases[lease.fd]
            os.close(lease.fd)
            lease.link.return_leases([lease.block.block_id])
