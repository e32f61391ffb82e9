"""The HMM's state and what each command does to it. No sockets and no clock of its own, so tests can drive it."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import msgspec

from elasticmoe_sglang.descriptors import descriptors_left
from elasticmoe_sglang.errors import HmmError, HmmTaken, ModelMismatch, ProtocolError, RegionMismatch, UndoFailed
from elasticmoe_sglang.hmm.blocks import BlockTable
from elasticmoe_sglang.hmm.ledger import Ledger
from elasticmoe_sglang.hmm.transaction import Transaction, TransactionTable
from elasticmoe_sglang.hmm.vmm.base import VmmBackend, round_up
from elasticmoe_sglang.hmm.wanted import block_bytes, parts_of
from elasticmoe_sglang.undo import UndoLog
from elasticmoe_sglang.wire import to_hmm

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class _Client:
    name: str
    pid: int
    server: bool
    leases: Counter[int] = field(default_factory=Counter)


class HmmService:
    """Blocks, ledger, transactions, regions and clients of one HMM.

    Args:
        backend: makes the memory.
        budgets: bytes of each device.
        endpoint: only shown in the status.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        backend: VmmBackend,
        budgets: Sequence[int],
        *,
        endpoint: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.endpoint = endpoint
        self.instance = secrets.token_hex(8)
        self.counters = to_hmm.Counters()
        self.ledger = Ledger(budgets)
        self.blocks = BlockTable(backend, self.ledger)
        self.txns = TransactionTable(self.ledger)
        self._clock = clock
        self._started = clock()
        self._model: to_hmm.ModelSpec | None = None
        self._regions: dict[str, to_hmm.RegionStatus] = {}
        self._clients: dict[str, _Client] = {}

    # Clients -----------------------------------------------------------------------------------------------------

    def attach(self, name: str, pid: int, *, server: bool = False) -> to_hmm.Welcome:
        """A new client; the id in the answer is its key from now on.

        Raises:
            HmmTaken: it is the main process of a server, and another one is attached.
        """
        other = next((client for client in self._clients.values() if client.server), None)
        if server and other is not None:
            raise HmmTaken(
                f"the HMM at {self.endpoint} serves another server, whose main process is {other.pid}",
                hint="Stop that server, or start an HMM of its own for this one: elasticmoe hmm --endpoint ipc://PATH",
            )
        client_id = secrets.token_hex(16)
        self._clients[client_id] = _Client(name=name, pid=pid, server=server)
        log.info("client %s (pid %d) attached", name, pid)
        return to_hmm.Welcome(
            client_id=client_id,
            instance=self.instance,
            backend=self.backend.name,
            granularity=self.backend.granularity,
            devices=self.ledger.devices,
        )

    def detach(self, client_id: str) -> None:
        """The client is gone: its open transactions are rolled back, its leases dropped. Committed blocks stay."""
        client = self._clients[client_id]
        transactions = self.txns.of(client_id)
        for transaction in transactions:
            self._roll_back_unasked(transaction, f"its owner {client.name} (pid {client.pid}) is gone")
        leases = sum(client.leases.values())
        for block_id, count in client.leases.items():
            self.blocks.unlease(block_id, count)
        del self._clients[client_id]
        log.info(
            "client %s (pid %d) gone: %d transactions rolled back, %d leases dropped",
            client.name,
            client.pid,
            len(transactions),
            leases,
        )

    def is_attached(self, client_id: str) -> bool:
        return client_id in self._clients

    def lease(self, client_id: str, block_ids: Sequence[int]) -> tuple[list[to_hmm.Block], list[int]]:
        """Blocks and a descriptor of each, which the caller sends and closes. All or none."""
        client = self._clients[client_id]
        blocks = [self.blocks.get(i) for i in block_ids]
        fds: list[int] = []
        try:
            for block_id in block_ids:
                fds.append(self.blocks.lease(block_id))
                client.leases[block_id] += 1
        except BaseException:
            for fd in fds:
                os.close(fd)
            self.unlease(client_id, block_ids[: len(fds)])
            raise
        return blocks, fds

    def unlease(self, client_id: str, block_ids: Sequence[int]) -> None:
        """Handles that the client closed and unmapped. Raises ProtocolError, changing nothing, for one it never had."""
        client = self._clients[client_id]
        returned = Counter(block_ids)
        for block_id, count in returned.items():
            if client.leases[block_id] < count:
                raise ProtocolError(
                    f"client {client.name} returned {count} leases of block {block_id} it does not hold"
                )
        for block_id, count in returned.items():
            client.leases[block_id] -= count
            if not client.leases[block_id]:
                del client.leases[block_id]
            self.blocks.unlease(block_id, count)

    def adopt(
        self, client_id: str, model: to_hmm.ModelSpec | None, offers: Sequence[to_hmm.Offer], fds: Sequence[int]
    ) -> int:
        """Takes over what an HMM that is gone has left with this client; returns how many blocks were new.

        A budget that is too small for what is in use already is logged, and refuses the next allocation.
        Raises ProtocolError, or ModelMismatch when the memory here belongs to another model.
        """
        if len(fds) != len(offers):
            raise ProtocolError(f"{len(offers)} blocks were offered with {len(fds)} descriptors")
        if model is not None:
            self.register_model(model)
        client = self._clients[client_id]
        before = self.blocks.adopted
        for offer, fd in zip(offers, fds, strict=True):
            block = offer.block
            self.blocks.adopt(block, fd)
            client.leases[block.block_id] += 1
            if block.name is not None and offer.region_bytes is not None:
                self._regions[block.name] = to_hmm.RegionStatus(
                    name=block.name, block_id=block.block_id, nbytes=offer.region_bytes
                )
        self._report_excess()
        log.info("%d blocks adopted from %s (pid %d)", self.blocks.adopted - before, client.name, client.pid)
        return self.blocks.adopted - before

    def _report_excess(self) -> None:
        for usage in self.ledger.usage():
            if usage.free < 0:
                log.error(
                    "device %d: %d bytes are in use, %d more than its budget; nothing can be allocated there",
                    usage.device,
                    usage.used,
                    -usage.free,
                )

    # Commands ----------------------------------------------------------------------------------------------------

    def execute(self, client_id: str, command: to_hmm.Command) -> to_hmm.Answer:
        """Does what an attached client asks; WaitSealed is answered by `sealed`, since it may have to wait."""
        match command:
            case to_hmm.StatusRequest():
                return self.status()
            case to_hmm.RegisterModel():
                return to_hmm.ModelReply(model=self.register_model(command.model))
            case to_hmm.OpenRegion():
                return to_hmm.BlocksReply(blocks=[self.open_region(command.name, command.nbytes)])
            case to_hmm.Begin():
                return to_hmm.TxnOpened(txn=self.begin(client_id, command.operation_id, command.timeout_s))
            case to_hmm.Commit():
                return self.commit(client_id, command.txn)
            case to_hmm.Rollback():
                return self.roll_back(client_id, command.txn)
            case to_hmm.Allocate():
                return to_hmm.BlocksReply(blocks=self.allocate(command))
            case to_hmm.Seal():
                self.blocks.seal(command.block_ids)
                return to_hmm.Done()
            case to_hmm.Lookup():
                return to_hmm.BlocksReply(blocks=self.lookup(command))
            case to_hmm.Release():
                self.release(command.block_ids, command.txn)
                return to_hmm.Done()
        raise AssertionError(f"{type(command).__name__} has no handler")

    def register_model(self, model: to_hmm.ModelSpec) -> to_hmm.ModelSpec:
        """The first registration counts. Raises ModelMismatch for a model that differs in more than `detail`."""
        held = self._model
        if held is None:
            self._model = held = model
        compared = ("fingerprint", "num_columns", "column_bytes", "dense_bytes")
        different = [
            f"{name} {getattr(held, name)} (asked for {getattr(model, name)})"
            for name in compared
            if getattr(held, name) != getattr(model, name)
        ]
        if different:
            raise ModelMismatch(
                f"the HMM holds another model: {', '.join(different)}",
                hint="Start the server with the model the HMM holds, or start a new HMM for this one.",
            )
        return held

    def open_region(self, name: str, nbytes: int) -> to_hmm.Block:
        """Creates the region on the first call. Raises RegionMismatch for another size later on."""
        region = self._regions.get(name)
        if region is not None and self.blocks.is_live(region.block_id):
            if region.nbytes != nbytes:
                raise RegionMismatch(
                    f"region {name!r} has {region.nbytes} bytes, {nbytes} were asked for",
                    hint="All who share a region name the same size; release it first to change that.",
                )
            return self.blocks.get(region.block_id)
        size = round_up(nbytes, self.backend.granularity)
        block = self.blocks.create(to_hmm.HOST, "window", size, name=name)
        self._regions[name] = to_hmm.RegionStatus(name=name, block_id=block.block_id, nbytes=nbytes)
        return block

    def allocate(self, command: to_hmm.Allocate) -> list[to_hmm.Block]:
        """One block a column or chunk, or a single one. All or none; a transaction's vanish when it is rolled back."""
        transaction = self.txns.get(command.txn) if command.txn is not None else None
        wanted = parts_of(command, self._model, held=self.lookup)
        size = round_up(block_bytes(command, self._model), self.backend.granularity)
        self.ledger.require(command.device, size * len(wanted))
        _require_descriptors(len(wanted))
        blocks: list[to_hmm.Block] = []
        with UndoLog[None](transaction.operation_id if transaction else None) as steps:
            for column, chunk in wanted:
                block = self.blocks.create(
                    command.device,
                    command.kind,
                    size,
                    column=column,
                    rank=command.rank,
                    chunk=chunk,
                    shard=command.shard,
                    txn=command.txn,
                )
                steps.record(f"free block {block.block_id}", partial(self._retire_if_live, block.block_id))
                blocks.append(block)
        if transaction is not None:
            transaction.undo.absorb(steps)
            transaction.blocks += [block.block_id for block in blocks]
            transaction.allocated_bytes += size * len(blocks)
        return blocks

    def lookup(self, command: to_hmm.Lookup) -> list[to_hmm.Block]:
        """Live blocks that match every given field, those of open transactions included."""
        columns = None if command.columns is None else set(command.columns)
        return self.blocks.find(
            lambda block: (
                (command.kind is None or block.kind == command.kind)
                and (command.device is None or block.device == command.device)
                and (columns is None or block.column in columns)
                and (command.rank is None or block.rank == command.rank)
            )
        )

    def release(self, block_ids: Sequence[int], txn: str | None) -> None:
        """Gives blocks up now, or when `txn` commits (and not at all when it is rolled back). All or none."""
        transaction = self.txns.get(txn) if txn is not None else None
        distinct = list(dict.fromkeys(block_ids))
        for block_id in distinct:
            self.blocks.get(block_id)
        if transaction is not None:
            transaction.releases += [i for i in distinct if i not in transaction.releases]
            return
        for block_id in distinct:
            self.blocks.retire(block_id)

    def sealed(self, block_ids: Sequence[int]) -> bool:
        """Whether all are sealed. Raises BlockNotFound when one is gone, since then it never will be."""
        blocks = [self.blocks.get(block_id) for block_id in block_ids]
        return all(block.sealed for block in blocks)

    # Transactions ------------------------------------------------------------------------------------------------

    def begin(self, client_id: str, operation_id: str, timeout_s: float) -> str:
        return self.txns.begin(operation_id, client_id, self._clock() + timeout_s).txn

    def commit(self, client_id: str, txn: str) -> to_hmm.TxnReport:
        """Allocated blocks stay, promised releases happen. Committing again gives the same report."""
        ended = self.txns.ended_as(txn, "committed")
        if ended is not None:
            return ended
        transaction = self.txns.owned(txn, client_id)
        transaction.undo.take()  # what it allocated stays
        self.blocks.committed(transaction.blocks)
        for block_id in transaction.releases:
            self._retire_if_live(block_id)
        return self._end(transaction, "committed", "it was committed")

    def roll_back(self, client_id: str, txn: str) -> to_hmm.TxnReport:
        """Undoes every step. Raises UndoFailed when one could not be; the transaction is over all the same."""
        ended = self.txns.ended_as(txn, "rolled_back")
        if ended is not None:
            return ended
        return self._roll_back(self.txns.owned(txn, client_id), "it was rolled back")

    def expire(self) -> None:
        """Rolls back transactions past their deadline. Call it often."""
        for transaction in self.txns.expired(self._clock()):
            self._roll_back_unasked(transaction, "its deadline passed and it was rolled back")

    # -------------------------------------------------------------------------------------------------------------

    def status(self) -> to_hmm.HmmStatus:
        """Everything, for people and for the coordinator."""
        now = self._clock()
        live, retired = self.blocks.counts()
        return to_hmm.HmmStatus(
            pid=os.getpid(),
            endpoint=self.endpoint,
            instance=self.instance,
            backend=self.backend.name,
            granularity=self.backend.granularity,
            uptime_s=round(now - self._started, 3),
            devices=self.ledger.usage(),
            host_bytes=self.blocks.host_bytes(),
            regions=[r for r in self._regions.values() if self.blocks.is_live(r.block_id)],
            blocks=live,
            retired_blocks=retired,
            adopted_blocks=self.blocks.adopted,
            model=self._model,
            txns=self.txns.status(now, {key: client.name for key, client in self._clients.items()}),
            clients=[
                to_hmm.ClientStatus(name=c.name, pid=c.pid, leases=sum(c.leases.values()))
                for c in self._clients.values()
            ],
            counters=msgspec.structs.replace(self.counters),
        )

    def close(self) -> None:
        """Gives all memory up; what clients have mapped lives on with them."""
        self.blocks.close()

    def _retire_if_live(self, block_id: int) -> None:
        if self.blocks.is_live(block_id):
            self.blocks.retire(block_id)

    def _roll_back(self, transaction: Transaction, why: str) -> to_hmm.TxnReport:
        try:
            transaction.undo.undo()
        except UndoFailed:
            self.counters.undo_failures += 1
            raise
        finally:
            report = self._end(transaction, "rolled_back", why)
        return report

    def _roll_back_unasked(self, transaction: Transaction, why: str) -> None:
        log.warning("transaction %s: %s", transaction.txn, why)
        try:
            self._roll_back(transaction, why)
        except UndoFailed as error:
            log.critical("%s", error)

    def _end(
        self, transaction: Transaction, outcome: Literal["committed", "rolled_back"], why: str
    ) -> to_hmm.TxnReport:
        report = to_hmm.TxnReport(
            txn=transaction.txn,
            operation_id=transaction.operation_id,
            outcome=outcome,
            allocated_blocks=len(transaction.blocks),
            allocated_bytes=transaction.allocated_bytes,
            released_blocks=len(transaction.releases) if outcome == "committed" else 0,
            peak_bytes=self.ledger.unwatch(transaction.txn),
        )
        self.txns.end(transaction, report, why)
        return report


def _require_descriptors(wanted: int) -> None:
    """A block is a descriptor. Raises HmmError when there are not so many more."""
    left = descriptors_left()
    if left < wanted:
        raise HmmError(
            f"the HMM may open {max(0, left)} more descriptors, and {wanted} are needed (Too many open files)",
            hint="Raise its limit of open files (ulimit -n, LimitNOFILE).",
        )
