"""The HMM's books against a simple model: budgets, peaks, transactions, leases, clients that vanish, in any order."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from elasticmoe_sglang.errors import (
    BlockNotFound,
    BudgetExceeded,
    ModelMismatch,
    ProtocolError,
    RegionMismatch,
    TransactionError,
    UndoFailed,
    UserInputError,
)
from elasticmoe_sglang.hmm.ledger import Ledger
from elasticmoe_sglang.hmm.service import HmmService
from elasticmoe_sglang.hmm.vmm.base import VaRange, VmmBackend, VmmHandle
from elasticmoe_sglang.undo import UndoLog
from elasticmoe_sglang.wire import to_hmm

pytestmark = pytest.mark.process

PAGE = 64
BUDGETS = (10 * PAGE, 7 * PAGE)


class CountingBackend(VmmBackend):
    """No memory, only the count of what was created and not closed; descriptors are real, so leaks would show."""

    name = "counting"

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[int] = Counter()
        self.refuse = False
        self._serial = 0

    @property
    def granularity(self) -> int:
        return PAGE

    def torch_device(self, device: int) -> str:
        return "cpu"

    def check(self, status: int, call: str) -> None:
        raise NotImplementedError

    def _create(self, nbytes: int, device: int) -> int:
        self._serial += 1
        self.live[device] += nbytes
        return self._serial

    def resident_bytes(self, handle: VmmHandle) -> int:
        return handle.nbytes

    def _export(self, handle: VmmHandle) -> int:
        return os.open(os.devnull, os.O_RDONLY)

    def _close(self, handle: VmmHandle) -> None:
        self.live[handle.device] -= handle.nbytes

    def _reserve(self, nbytes: int) -> int:
        raise NotImplementedError

    def _release_va(self, va: VaRange) -> None:
        raise NotImplementedError

    def _map(self, va: int, handle: VmmHandle) -> None:
        raise NotImplementedError

    def _unmap(self, va: int, nbytes: int) -> None:
        raise NotImplementedError

    def _import(self, fd: int, nbytes: int, device: int) -> int:
        raise NotImplementedError

    def _copy(self, dst: int, src: int, nbytes: int) -> None:
        raise NotImplementedError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class HmmMachine(RuleBasedStateMachine):
    """Drives HmmService and keeps, beside it, plain dictionaries of what must be true."""

    clients = Bundle("clients")
    blocks = Bundle("blocks")
    txns = Bundle("txns")

    def __init__(self) -> None:
        super().__init__()
        self.backend = CountingBackend()
        self.clock = Clock()
        self.service = HmmService(self.backend, BUDGETS, clock=self.clock)
        self.size: dict[int, tuple[int, int]] = {}  # block -> (device, bytes); live or still leased
        self.live: set[int] = set()
        self.leases: dict[str, Counter[int]] = {}
        self.open: dict[str, tuple[str, float]] = {}  # txn -> (owner, deadline)
        self.made: dict[str, list[int]] = {}
        self.promised: dict[str, list[int]] = {}
        self.peak = [0, 0]
        self.operations = 0

    # The model -----------------------------------------------------------------------------------------------------

    def used(self, device: int) -> int:
        return sum(nbytes for where, nbytes in self.size.values() if where == device)

    def leased(self, block: int) -> bool:
        return any(held[block] for held in self.leases.values())

    def drop(self, block: int) -> None:
        self.live.discard(block)
        if not self.leased(block):
            self.size.pop(block, None)

    def drop_unleased(self) -> None:
        for block in list(self.size):
            if block not in self.live:
                self.drop(block)

    def end(self, txn: str, *, committed: bool) -> None:
        del self.open[txn]
        for block in self.promised.pop(txn) if committed else self.made[txn]:
            self.drop(block)

    # Rules ---------------------------------------------------------------------------------------------------------

    @initialize(target=clients)
    def first_client(self) -> str:
        return self.attach()

    @rule(target=clients)
    def attach(self) -> str:
        client = self.service.attach("c", 1).client_id
        self.leases[client] = Counter()
        return client

    @rule(client=consumes(clients))
    def die(self, client: str) -> None:
        self.service.detach(client)
        for txn in [t for t, (owner, _) in self.open.items() if owner == client]:
            self.end(txn, committed=False)
        del self.leases[client]
        self.drop_unleased()

    @rule(target=txns, client=clients, timeout=st.sampled_from([5.0, 50.0]))
    def begin(self, client: str, timeout: float) -> str:
        self.operations += 1
        operation = f"op{self.operations}"
        txn = self.service.begin(client, operation, timeout)
        assert self.service.begin(client, operation, timeout) == txn
        self.open[txn] = (client, self.clock.now + timeout)
        self.made[txn], self.promised[txn] = [], []
        return txn

    @rule(
        target=blocks,
        device=st.integers(0, 2),
        columns=st.lists(st.integers(0, 5), max_size=4),
        nbytes=st.integers(1, 3 * PAGE),
    )
    def allocate(self, device: int, columns: list[int], nbytes: int):  # type: ignore[no-untyped-def]
        return multiple(*self.allocate_in(None, device, columns, nbytes))

    @rule(
        target=blocks,
        txn=txns,
        device=st.integers(0, 1),
        columns=st.lists(st.integers(0, 5), max_size=4),
        nbytes=st.integers(1, 3 * PAGE),
    )
    def allocate_in_transaction(self, txn: str, device: int, columns: list[int], nbytes: int):  # type: ignore[no-untyped-def]
        return multiple(*self.allocate_in(txn, device, columns, nbytes))

    def allocate_in(self, txn: str | None, device: int, columns: list[int], nbytes: int) -> list[int]:
        command = to_hmm.Allocate(device=device, kind="column", columns=columns, nbytes=nbytes, txn=txn)
        size = -(-nbytes // PAGE) * PAGE
        if txn is not None and txn not in self.open:
            with pytest.raises(TransactionError):
                self.service.allocate(command)
            return []
        if not columns or len(set(columns)) != len(columns) or device > 1:
            with pytest.raises(UserInputError):
                self.service.allocate(command)
            return []
        free = BUDGETS[device] - self.used(device)
        if size * len(columns) > free:
            with pytest.raises(BudgetExceeded) as caught:
                self.service.allocate(command)
            error = caught.value
            assert (error.device, error.needed, error.free) == (device, size * len(columns), free)
            assert error.budget == BUDGETS[device]
            return []
        blocks = self.service.allocate(command)
        assert [block.column for block in blocks] == columns
        for block in blocks:
            assert block.block_id not in self.size
            self.size[block.block_id] = (device, size)
            self.live.add(block.block_id)
        if txn is not None:
            self.made[txn] += [block.block_id for block in blocks]
        self.peak[device] = max(self.peak[device], self.used(device))
        return [block.block_id for block in blocks]

    @rule(block=blocks)
    def release(self, block: int) -> None:
        if block not in self.live:
            with pytest.raises(BlockNotFound):
                self.service.release([block], None)
            return
        self.service.release([block], None)
        self.drop(block)

    @rule(block=blocks, other=blocks, txn=txns)
    def promise(self, block: int, other: int, txn: str) -> None:
        if txn not in self.open:
            with pytest.raises(TransactionError):
                self.service.release([block, other], txn)
        elif not {block, other} <= self.live:
            with pytest.raises(BlockNotFound):
                self.service.release([block, other], txn)
        else:
            self.service.release([block, other], txn)
            self.promised[txn] += [block, other]

    @rule(txn=txns, client=clients, committed=st.booleans())
    def end_by(self, txn: str, client: str, committed: bool) -> None:
        act = self.service.commit if committed else self.service.roll_back
        if txn not in self.open:
            ended = self.service.txns.ended_as(txn, "committed" if committed else "rolled_back")
            if ended is not None:
                assert act(client, txn) == ended
            else:
                with pytest.raises(TransactionError):
                    act(client, txn)
        elif self.open[txn][0] != client:
            with pytest.raises(TransactionError, match="another client"):
                act(client, txn)
        else:
            report = act(client, txn)
            assert report.allocated_blocks == len(self.made[txn])
            self.end(txn, committed=committed)
            assert all(most >= self.used(device) for device, most in enumerate(report.peak_bytes))

    @rule(seconds=st.sampled_from([1.0, 10.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        self.service.expire()
        for txn in [t for t, (_, deadline) in self.open.items() if deadline <= self.clock.now]:
            self.end(txn, committed=False)

    @rule(client=clients, wanted=st.lists(blocks, min_size=1, max_size=3))
    def lease(self, client: str, wanted: list[int]) -> None:
        if not set(wanted) <= self.live:
            with pytest.raises(BlockNotFound):
                self.service.lease(client, wanted)
            return
        found, fds = self.service.lease(client, wanted)
        for fd in fds:
            os.close(fd)
        assert [block.block_id for block in found] == wanted
        self.leases[client].update(wanted)

    @rule(client=clients, block=blocks, count=st.integers(1, 2))
    def unlease(self, client: str, block: int, count: int) -> None:
        if self.leases[client][block] < count:
            with pytest.raises(ProtocolError):
                self.service.unlease(client, [block] * count)
            return
        self.service.unlease(client, [block] * count)
        self.leases[client][block] -= count
        self.drop_unleased()

    @rule(block=blocks)
    def seal(self, block: int) -> None:
        if block not in self.live:
            with pytest.raises(BlockNotFound):
                self.service.blocks.seal([block])
            return
        self.service.blocks.seal([block])
        assert self.service.sealed([block])

    # What must hold at any time ------------------------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        status = self.service.status()
        for usage in status.devices:
            assert usage.used == self.used(usage.device) == self.backend.live[usage.device]
            assert usage.used == sum(usage.by_kind.values()) <= usage.budget == BUDGETS[usage.device]
            assert usage.peak == self.peak[usage.device]
        assert (status.blocks, status.retired_blocks) == (len(self.live), len(self.size) - len(self.live))
        assert sum(client.leases for client in status.clients) == sum(
            sum(held.values()) for held in self.leases.values()
        )
        assert {txn.txn for txn in status.txns} == set(self.open)
        assert {block.block_id for block in self.service.lookup(to_hmm.Lookup())} == self.live

    def teardown(self) -> None:
        for client in list(self.leases):
            self.die(client)
        for block in list(self.live):
            self.release(block)
        assert not any(self.backend.live.values()) and self.backend.usage().open_handles == 0
        assert [usage.used for usage in self.service.ledger.usage()] == [0, 0]


TestHmm = HmmMachine.TestCase
TestHmm.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# Single facts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def service() -> HmmService:
    return HmmService(CountingBackend(), BUDGETS)


def test_a_budget_is_exact_to_the_byte() -> None:
    ledger = Ledger([100])
    ledger.charge(0, "kv", 60)
    with pytest.raises(BudgetExceeded, match="40 of 100 bytes free, 41 are needed"):
        ledger.charge(0, "kv", 41)
    assert ledger.used(0) == 60
    ledger.charge(0, "dense", 40)
    assert ledger.usage()[0].by_kind == {"kv": 60, "dense": 40}
    ledger.refund(0, "kv", 60)
    assert (ledger.used(0), ledger.usage()[0].peak) == (40, 100)


def test_a_watch_records_the_peak_while_it_lasts() -> None:
    ledger = Ledger([100, 100])
    ledger.charge(0, "kv", 30)
    ledger.watch("op")
    ledger.charge(0, "kv", 50)
    ledger.refund(0, "kv", 70)
    assert ledger.unwatch("op") == [80, 0]


def test_host_memory_has_no_budget(service: HmmService) -> None:
    block = service.open_region("collective region", 1000 * PAGE - 1)
    assert (block.device, block.nbytes, block.name) == (to_hmm.HOST, 1000 * PAGE, "collective region")
    assert service.status().host_bytes == 1000 * PAGE
    assert [usage.used for usage in service.ledger.usage()] == [0, 0]
    assert service.open_region("collective region", 1000 * PAGE - 1) == block
    with pytest.raises(RegionMismatch, match="has 63999 bytes, 64000 were asked for"):
        service.open_region("collective region", 1000 * PAGE)
    service.release([block.block_id], None)
    assert service.open_region("collective region", PAGE).block_id != block.block_id
    assert [region.nbytes for region in service.status().regions] == [PAGE]


def test_the_model_is_registered_once(service: HmmService) -> None:
    model = to_hmm.ModelSpec(fingerprint="a", num_columns=4, column_bytes=100, dense_bytes=50, detail={"from": "here"})
    assert service.register_model(model) == model
    again = to_hmm.ModelSpec(fingerprint="a", num_columns=4, column_bytes=100, dense_bytes=50)
    assert service.register_model(again) == model
    other = to_hmm.ModelSpec(fingerprint="b", num_columns=4, column_bytes=200, dense_bytes=50)
    with pytest.raises(ModelMismatch, match=r"fingerprint a \(asked for b\), column_bytes 100 \(asked for 200\)"):
        service.register_model(other)
    [block] = service.allocate(to_hmm.Allocate(device=0, kind="dense"))
    assert block.nbytes == PAGE
    with pytest.raises(UserInputError, match="column 4 does not exist"):
        service.allocate(to_hmm.Allocate(device=0, kind="column", columns=[1, 4]))


def test_undoing_runs_backwards_past_failures_and_says_so() -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError("the driver said no")

    log = UndoLog[None]("op-7")
    log.record("first", lambda: done.append("first"))
    log.record("second", fail)
    log.record("third", lambda: done.append("third"))
    with pytest.raises(UndoFailed, match=r"1 steps could not be undone: second: the driver said no .*op-7"):
        log.undo()
    assert done == ["third", "first"]
    assert len(log) == 0


def test_an_undo_that_fails_is_counted_and_ends_the_transaction(service: HmmService) -> None:
    client = service.attach("c", 1).client_id
    txn = service.begin(client, "op", 60.0)
    [block] = service.allocate(to_hmm.Allocate(device=0, kind="kv", nbytes=PAGE, txn=txn))

    def fail() -> None:
        raise OSError("no")

    service.txns.get(txn).undo.record("something", fail)
    with pytest.raises(UndoFailed):
        service.roll_back(client, txn)
    assert service.counters.undo_failures == 1
    assert not service.blocks.is_live(block.block_id)
    assert service.roll_back(client, txn).outcome == "rolled_back"


def test_steps_of_a_block_that_raises_are_undone() -> None:
    done: list[int] = []
    with pytest.raises(KeyError), UndoLog[None]() as log:
        log.record("one", lambda: done.append(1))
        raise KeyError
    assert done == [1]


def test_an_expired_transaction_says_so(service: HmmService) -> None:
    client = service.attach("c", 1).client_id
    txn = service.begin(client, "op", 0.0)
    service.expire()
    with pytest.raises(TransactionError, match="its deadline passed"):
        service.commit(client, txn)
