"""The transactions that clients keep open, each with an undo log for its rollback.

An undo is recorded only after its step succeeded, so undoing never touches what never happened.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass, field

from elasticmoe_sglang.errors import TransactionError
from elasticmoe_sglang.hmm.ledger import Ledger
from elasticmoe_sglang.undo import UndoLog
from elasticmoe_sglang.wire.to_hmm import TxnReport, TxnStatus

_REMEMBERED = 1024
"""Ended transactions whose outcome is still known, for retries."""


@dataclass(kw_only=True, eq=False)
class Transaction:
    """An open transaction of one client.

    undo: what to do on rollback; releases: blocks to give up on commit.
    """

    txn: str
    operation_id: str
    owner: str
    deadline: float
    undo: UndoLog[None]
    releases: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    allocated_bytes: int = 0


class TransactionTable:
    """Opens and ends transactions. What commit and rollback mean for blocks is the caller's: see HmmService."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._open: dict[str, Transaction] = {}
        self._ended: OrderedDict[str, tuple[str, TxnReport]] = OrderedDict()
        self._numbers = itertools.count(1)

    def begin(self, operation_id: str, owner: str, deadline: float) -> Transaction:
        """Opens one, or returns the owner's open one of the same operation."""
        for transaction in self._open.values():
            if transaction.operation_id == operation_id:
                self._require_owner(transaction, owner)
                return transaction
        txn = f"{next(self._numbers)}:{operation_id}"
        transaction = Transaction(
            txn=txn, operation_id=operation_id, owner=owner, deadline=deadline, undo=UndoLog(operation_id)
        )
        self._open[txn] = transaction
        self._ledger.watch(txn)
        return transaction

    def get(self, txn: str) -> Transaction:
        """The open transaction. Raises TransactionError when there is none, with what became of it."""
        if txn in self._open:
            return self._open[txn]
        if txn in self._ended:
            why, report = self._ended[txn]
            raise TransactionError(
                f"transaction {txn} is over: {why}", operation=report.operation_id, hint="Begin a new one."
            )
        raise TransactionError(f"transaction {txn} does not exist", hint="The HMM may have been started anew.")

    def owned(self, txn: str, owner: str) -> Transaction:
        """Like `get`, for what only the owner may do."""
        transaction = self.get(txn)
        self._require_owner(transaction, owner)
        return transaction

    def ended_as(self, txn: str, outcome: str) -> TxnReport | None:
        """The report of a transaction that ended this way, so that a repeated end is answered alike."""
        ended = self._ended.get(txn)
        return ended[1] if ended is not None and ended[1].outcome == outcome else None

    def end(self, transaction: Transaction, report: TxnReport, why: str) -> None:
        """Closes it and remembers the outcome."""
        del self._open[transaction.txn]
        self._ended[transaction.txn] = (why, report)
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)

    def of(self, owner: str) -> list[Transaction]:
        """The owner's open ones."""
        return [t for t in self._open.values() if t.owner == owner]

    def expired(self, now: float) -> list[Transaction]:
        """Open ones past their deadline."""
        return [t for t in self._open.values() if t.deadline <= now]

    def next_deadline(self) -> float | None:
        """When the next one expires, on the caller's clock."""
        return min((t.deadline for t in self._open.values()), default=None)

    def status(self, now: float, names: dict[str, str]) -> list[TxnStatus]:
        """All open ones; `names` turns owners into names for people."""
        return [
            TxnStatus(
                txn=t.txn,
                operation_id=t.operation_id,
                owner=names.get(t.owner, t.owner),
                allocated_blocks=len(t.blocks),
                expires_in_s=round(t.deadline - now, 3),
            )
            for t in self._open.values()
        ]

    def _require_owner(self, transaction: Transaction, owner: str) -> None:
        if transaction.owner != owner:
            raise TransactionError(
                f"transaction {transaction.txn} belongs to another client",
                operation=transaction.operation_id,
                hint="Only the client that began a transaction ends it.",
            )
