"""A rank's weights: leases on HMM memory, mapped at the addresses of the model's tensors.

The rank maps, the HMM owns. Columns of this rank are mapped in their slots; every other slot of the reservation is
unmapped, and the slot table keeps kernels from accessing it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.layout import ColumnLayout, DenseLayout
from elasticmoe_sglang.hmm.space import ColumnSpace, DenseSpace
from elasticmoe_sglang.planner.placement import TURNS, turns_of
from elasticmoe_sglang.wire.to_hmm import Block, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Attached:
    """What `WorkerWeights.attach` found.

    load_columns: columns that no device holds yet; the caller fills them from the checkpoint and calls `filled`.
    load_dense: the dense block has to be filled by the caller too.
    """

    load_columns: frozenset[int]
    load_dense: bool


@dataclass(frozen=True, kw_only=True)
class PullResult:
    """Columns copied, bytes of them, and seconds spent copying."""

    columns: int
    bytes: int
    seconds: float


def _settled(blocks: Iterable[Block], txn: str | None) -> list[Block]:
    """Those that no other transaction may roll back yet."""
    return [block for block in blocks if block.txn in (None, txn)]


class WorkerWeights:
    """Args:
    client: this process's HMM client.
    rank, device: whose memory this is.
    shard: which part of the dense weights this rank has; 0 where it has all.
    bytes_per_second: limit for copies during a change; None for no limit.
    """

    def __init__(
        self,
        client: HmmClient,
        *,
        rank: int,
        device: int,
        bytes_per_second: int | None,
        deadline_s: float,
        shard: int = 0,
    ) -> None:
        self._client = client
        self._rank = rank
        self._device = device
        self._shard = shard
        self._limit = bytes_per_second
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._pending_seal: list[int] = []
        self.pulled_bytes = 0
        self.columns: ColumnSpace
        self.dense: DenseSpace
        self.slot_table: torch.Tensor
        """int32 [turns, columns + 1]: in each turn, expert column -> slot, -1 for not here or another holder's. The
        last entry is -1, so that an id of -1, which indexes it, stays -1."""

    def attach(
        self,
        spec: ModelSpec,
        columns: ColumnLayout,
        dense: DenseLayout,
        *,
        owned: Sequence[int],
        txn: str | None,
        dense_source: int,
        fill_dense: bool,
        table_device: torch.device,
        shared: Mapping[int, tuple[int, int]] | None = None,
        turns: int = 1,
    ) -> Attached:
        """Reserve address space for all columns, map ours, and copy from other devices what they hold already.

        Args:
            owned: this rank's columns, copies included.
            txn: transaction for what is allocated; None keeps it at once (a server's start).
            dense_source: device whose dense block is copied when ours is new.
            fill_dense: this rank fills the dense block itself when no device holds one yet.
            shared: see `switch`. turns: TURNS on a server whose columns may have copies, else 1.

        Raises:
            ModelMismatch: the HMM holds another model. BudgetExceeded: no memory. WorkerError: no source in time.
        """
        self._client.register_model(spec)
        backend = self._client.backend
        self.columns = ColumnSpace(backend, spec.num_columns, columns.column_bytes, device=self._device)
        self.dense = DenseSpace(backend, dense, device=self._device)
        self.slot_table = torch.full((turns, spec.num_columns + 1), -1, dtype=torch.int32, device=table_device)
        load_dense = self._attach_dense(txn, dense_source, fill_dense)
        load_columns = self._attach_columns(owned, txn)
        self.switch(owned, shared)
        return Attached(load_columns=load_columns, load_dense=load_dense)

    def _attach_dense(self, txn: str | None, source_device: int, fill: bool) -> bool:
        if txn is None and not fill and source_device == self._device:
            self._await_block()  # at a server's start the rank that fills it allocates it
        [block, new] = self._dense_block(txn)
        [handle] = self._client.handles([block.block_id])
        self.dense.map(handle)
        if not new:
            self._client.wait_sealed([block.block_id], self._deadline_s)
            return False
        sources = [other for other in self._dense_blocks() if other.device != self._device and other.sealed]
        if not sources and fill:
            self._pending_seal.append(block.block_id)
            return True
        source = next((other for other in sources if other.device == source_device), None) or self._await_dense(sources)
        [source_handle] = self._client.handles([source.block_id])
        self.pulled_bytes += self.dense.pull(source_handle).nbytes
        self._client.seal([block.block_id])
        return False

    def _await_block(self) -> None:
        deadline = time.monotonic() + self._deadline_s
        while not self._dense_blocks(self._device) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _dense_blocks(self, device: int | None = None) -> list[Block]:
        """Blocks that hold our part of the dense weights."""
        return [block for block in self._client.lookup(kind="dense", device=device) if block.shard == self._shard]

    def _dense_block(self, txn: str | None) -> tuple[Block, bool]:
        """Our device's dense block, and whether this rank has just allocated it (ranks of one device share it)."""
        found = self._dense_blocks(self._device)
        if settled := _settled(found, txn):
            return settled[0], False
        [block] = self._client.allocate(self._device, "dense", shard=self._shard, txn=txn)
        return block, True

    def _await_dense(self, sources: list[Block]) -> Block:
        """At a server's start the filling rank may not have allocated its block yet."""
        if sources:
            return sources[0]
        deadline = time.monotonic() + self._deadline_s
        while time.monotonic() < deadline:
            # Any that is filled: another rank's may be waiting just as this one does.
            for block in self._dense_blocks():
                if block.device != self._device and block.sealed:
                    return block
            time.sleep(0.01)
        raise WorkerError(
            f"no device had the dense weights within {self._deadline_s:.0f} s",
            rank=self._rank,
            hint="The rank that loads them has failed; its log says why",
        )

    def _attach_columns(self, owned: Sequence[int], txn: str | None) -> frozenset[int]:
        known = self._filled_blocks(owned, txn) if owned else []
        here = {block.column: block for block in known if block.device == self._device}
        elsewhere = {block.column: block for block in known if block.device != self._device}
        self._map(list(here.values()))
        missing = [column for column in owned if column not in here]
        self.pull({column: elsewhere[column].device for column in missing if column in elsewhere}, txn)
        load = [column for column in missing if column not in elsewhere]
        blocks = self._client.allocate(self._device, "column", columns=load, txn=txn) if load else []
        self._map(blocks)
        self._pending_seal += [block.block_id for block in blocks]
        return frozenset(load)

    def take(self, owned: Sequence[int], txn: str | None, shared: Mapping[int, tuple[int, int]] | None = None) -> int:
        """Map and serve columns that other ranks hold, as a hot standby that joins; returns the bytes copied.

        Args:
            shared: see `switch`.

        Raises:
            BudgetExceeded: no memory. WorkerError: a column is on no device.
        """
        before = self.pulled_bytes
        absent = self._attach_columns(owned, txn)
        if absent:
            raise WorkerError(f"columns {sorted(absent)} are on no device", rank=self._rank)
        self.switch(owned, shared)
        return self.pulled_bytes - before

    def give_up(self) -> int:
        """Serve nothing and unmap every column: how many there were. No launched kernel may read them."""
        self.switch(())
        return self.unmap(self.columns.mapped())

    def filled(self) -> None:
        """The caller has filled what `attach` asked for; others may copy it from now on."""
        if self._pending_seal:
            self._client.seal(self._pending_seal)
            self._pending_seal = []

    def _map(self, blocks: Iterable[Block]) -> None:
        blocks = list(blocks)
        if not blocks:
            return
        for block, handle in zip(blocks, self._client.handles([block.block_id for block in blocks]), strict=True):
            assert block.column is not None
            self.columns.map_column(block.column, handle)

    def pull(self, sources: Mapping[int, int], txn: str | None) -> PullResult:
        """Map columns into their free slots and fill them from the devices that hold them now (column -> device).

        No table points at these slots yet, so serving continues meanwhile. A column that is on this device already
        (another rank of the device had it) is mapped without a copy.

        Raises:
            BudgetExceeded: no memory. WorkerError: a source is gone, or `unmap` stopped the copy.
        """
        with self._lock:
            self._stop.clear()
            return self._pull(sources, txn)

    def _pull(self, sources: Mapping[int, int], txn: str | None) -> PullResult:
        started = time.monotonic()
        near = [column for column, source in sources.items() if source == self._device]
        far = [column for column, source in sources.items() if source != self._device]
        if near:
            self._map(self._filled_on(near, self._device, txn))
        if not far:
            return PullResult(columns=len(near), bytes=0, seconds=time.monotonic() - started)
        new = self._client.allocate(self._device, "column", columns=far, txn=txn or None)
        copied = sum(self._fetch(column, sources[column], block, txn) for column, block in zip(far, new, strict=True))
        self._client.seal([block.block_id for block in new])
        self.pulled_bytes += copied
        return PullResult(columns=len(sources), bytes=copied, seconds=time.monotonic() - started)

    def _filled_blocks(self, columns: Sequence[int], txn: str | None, device: int | None = None) -> list[Block]:
        """Sealed blocks of these columns. What another change has allocated may be rolled back yet, so such a block
        counts only where there is no other: that change serves, and the HMM has not heard so."""
        sealed = [b for b in self._client.lookup(kind="column", device=device, columns=list(columns)) if b.sealed]
        settled = _settled(sealed, txn)
        known = {block.column for block in settled}
        return settled + [block for block in sealed if block.column not in known]

    def _filled_on(self, columns: Sequence[int], device: int, txn: str | None) -> list[Block]:
        found = {block.column: block for block in self._filled_blocks(columns, txn, device)}
        gone = [column for column in columns if column not in found]
        if gone:
            raise WorkerError(f"columns {gone} are not on device {device} any more", rank=self._rank)
        return [found[column] for column in columns]

    def _fetch(self, column: int, source_device: int, block: Block, txn: str | None) -> int:
        assert block.column == column
        self._map([block])
        [source] = self._filled_on([column], source_device, txn)
        [handle] = self._client.handles([source.block_id])
        stats = self.columns.pull(column, handle, bytes_per_second=self._limit, should_stop=self._stop.is_set)
        if not stats.complete:
            raise WorkerError("the copy was stopped because the change is rolled back", rank=self._rank)
        return stats.nbytes

    def unmap(self, columns: Iterable[int]) -> int:
        """Unmap columns that no table points at; how many were mapped. The HMM frees them when it is told to.

        A `pull` that runs in another thread ends at its next chunk and fails.
        """
        self._stop.set()
        with self._lock:
            mapped = self.columns.mapped()
            gone = [column for column in columns if column in mapped]
            for column in gone:
                self.columns.unmap_column(column)
        return len(gone)

    def switch(self, owned: Iterable[int], shared: Mapping[int, tuple[int, int]] | None = None) -> None:
        """Point the slot table at these columns; all of them must be mapped. Between two batches only.

        Args:
            shared: of those that other ranks hold too, this rank's place among the holders, and their number: it
                computes a column's rows in its own turns only. None: of none.

        Raises:
            WorkerError: a column is not mapped, or is shared and this server's columns have no copies.
        """
        here, turns = list(owned), self.slot_table.shape[0]
        mapped = self.columns.mapped()
        absent = [column for column in here if column not in mapped]
        if absent:
            raise WorkerError(f"columns {absent} cannot be served: they are not mapped", rank=self._rank)
        if shared and turns != TURNS:
            raise WorkerError(
                f"columns {sorted(shared)} have copies, and the tables of this rank have no turns", rank=self._rank
            )
        self.slot_table.copy_(slots_by_turn(self.slot_table.shape, here, shared or {}))


def slots_by_turn(shape: Sequence[int], here: Sequence[int], shared: Mapping[int, tuple[int, int]]) -> torch.Tensor:
    """int32 [turns, columns + 1] of this shape: in each turn the slots of the columns that a rank computes, else -1.

    Args:
        here, shared: see `WorkerWeights.switch`.
    """
    table = torch.full(tuple(shape), -1, dtype=torch.int32)
    table[:, list(here)] = torch.tensor(list(here), dtype=torch.int32)
    for column, (place, holders) in shared.items():
        table[:, column] = -1
        table[turns_of(column, place, holders), column] = column
    return table
