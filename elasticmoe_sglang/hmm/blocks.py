"""The blocks an HMM owns: physical memory, its charge in the ledger, and who still holds a handle of it."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from elasticmoe_sglang.errors import BlockNotFound, ProtocolError
from elasticmoe_sglang.hmm.ledger import Ledger
from elasticmoe_sglang.hmm.vmm.base import VmmBackend, VmmHandle
from elasticmoe_sglang.wire.to_hmm import HOST, Block, Kind


@dataclass(kw_only=True)
class _Entry:
    """fd: of an adopted block, the descriptor it was imported from, where its handle does not keep it: drivers export
    no imported memory again."""

    block: Block
    handle: VmmHandle
    fd: int | None = None
    leases: int = 0
    retired: bool = False


class BlockTable:
    """Creates, finds and retires blocks.

    A retired block is found no more, but its memory lives as long as some client has it mapped; so it stays charged
    until the last lease came back. The ledger therefore always shows what is really taken. HOST memory is not in it: it
    counts against no device's budget, and how much is taken grows as pages are written (`host_bytes`).
    """

    def __init__(self, backend: VmmBackend, ledger: Ledger) -> None:
        self._backend = backend
        self._ledger = ledger
        self._entries: dict[int, _Entry] = {}
        # Far from those of any other HMM, so that a block keeps its id when another HMM adopts it.
        self._ids = itertools.count(secrets.randbits(31) << 20)
        self.adopted = 0

    def create(
        self,
        device: int,
        kind: Kind,
        nbytes: int,
        *,
        column: int | None = None,
        name: str | None = None,
        rank: int | None = None,
        chunk: int | None = None,
        shard: int = 0,
        txn: str | None = None,
    ) -> Block:
        """Charges and creates; `nbytes` is a multiple of the granularity. Raises BudgetExceeded or VmmError."""
        if device != HOST:
            self._ledger.charge(device, kind, nbytes)
        try:
            handle = self._backend.create(nbytes, device)
        except BaseException:
            if device != HOST:
                self._ledger.refund(device, kind, nbytes)
            raise
        block = Block(
            block_id=next(self._ids),
            device=device,
            kind=kind,
            column=column,
            name=name,
            rank=rank,
            chunk=chunk,
            shard=shard,
            nbytes=nbytes,
            txn=txn,
        )
        self._entries[block.block_id] = _Entry(block=block, handle=handle)
        return block

    def adopt(self, block: Block, fd: int) -> bool:
        """Takes over memory of another HMM and counts one lease of it; `fd` stays the caller's. Whether it was new.

        Raises VmmError when the descriptor is not what the block says, ProtocolError when other clients said otherwise.
        """
        entry = self._entries.get(block.block_id)
        if entry is not None:
            _require_same(entry.block, block)
            entry.block = msgspec.structs.replace(entry.block, sealed=entry.block.sealed or block.sealed)
            entry.leases += 1
            return False
        handle = self._backend.import_(os.dup(fd), block.nbytes, block.device)
        try:
            if block.device != HOST:
                self._ledger.count(block.device, block.kind, block.nbytes)
        except BaseException:
            self._backend.close(handle)
            raise
        # The transaction it may have been allocated in ended with its HMM.
        adopted = msgspec.structs.replace(block, txn=None)
        kept = None if self._backend.descriptor(handle) is not None else os.dup(fd)
        self._entries[block.block_id] = _Entry(block=adopted, handle=handle, fd=kept, leases=1)
        self.adopted += 1
        return True

    def get(self, block_id: int) -> Block:
        """Raises BlockNotFound."""
        return self._live(block_id).block

    def find(self, wanted: Callable[[Block], bool]) -> list[Block]:
        """Live blocks that `wanted` accepts, by id."""
        found = [e.block for e in self._entries.values() if not e.retired and wanted(e.block)]
        return sorted(found, key=lambda block: block.block_id)  # adopted ones come in any order

    def seal(self, block_ids: Iterable[int]) -> None:
        """Declares contents complete; all or none."""
        self._replace(block_ids, sealed=True)

    def committed(self, block_ids: Iterable[int]) -> None:
        """The blocks belong to no transaction any more."""
        self._replace((i for i in block_ids if self.is_live(i)), txn=None)

    def retire(self, block_id: int) -> None:
        """Gives a block up; its memory and charge go with the last lease."""
        entry = self._live(block_id)
        entry.retired = True
        self._settle(entry)

    def is_live(self, block_id: int) -> bool:
        entry = self._entries.get(block_id)
        return entry is not None and not entry.retired

    def lease(self, block_id: int) -> int:
        """Counts one lease and returns a descriptor of the memory, which the caller closes."""
        entry = self._live(block_id)
        kept = self._backend.descriptor(entry.handle) if entry.fd is None else entry.fd
        fd = self._backend.export(entry.handle) if kept is None else os.dup(kept)
        entry.leases += 1
        return fd

    def unlease(self, block_id: int, count: int = 1) -> None:
        """Takes leases back."""
        entry = self._entries[block_id]
        assert entry.leases >= count, f"block {block_id} has {entry.leases} leases, {count} were returned"
        entry.leases -= count
        self._settle(entry)

    def counts(self) -> tuple[int, int]:
        """How many blocks are (live, retired)."""
        retired = sum(e.retired for e in self._entries.values())
        return len(self._entries) - retired, retired

    def host_bytes(self) -> int:
        """Bytes of HOST memory in use, of retired blocks too."""
        host = [entry.handle for entry in self._entries.values() if entry.block.device == HOST]
        return sum(self._backend.resident_bytes(handle) for handle in host)

    def close(self) -> None:
        """Closes every handle; what clients have mapped lives on with them."""
        for entry in self._entries.values():
            self._free(entry)
        self._entries.clear()

    def _settle(self, entry: _Entry) -> None:
        if not entry.retired or entry.leases:
            return
        del self._entries[entry.block.block_id]
        self._free(entry)
        if entry.block.device != HOST:
            self._ledger.refund(entry.block.device, entry.block.kind, entry.block.nbytes)

    def _free(self, entry: _Entry) -> None:
        self._backend.close(entry.handle)
        if entry.fd is not None:
            os.close(entry.fd)

    def _replace(self, block_ids: Iterable[int], **changes: object) -> None:
        for entry in [self._live(i) for i in block_ids]:
            entry.block = msgspec.structs.replace(entry.block, **changes)

    def _live(self, block_id: int) -> _Entry:
        entry = self._entries.get(block_id)
        if entry is None or entry.retired:
            raise BlockNotFound(
                f"block {block_id} does not exist or was released", hint="Look it up again; another client released it."
            )
        return entry


def _require_same(held: Block, offered: Block) -> None:
    for name in ("device", "kind", "column", "name", "rank", "chunk", "shard", "nbytes"):
        if getattr(held, name) != getattr(offered, name):
            raise ProtocolError(
                f"block {held.block_id} was offered with {name} {getattr(offered, name)}, "
                f"another client says {getattr(held, name)}"
            )
