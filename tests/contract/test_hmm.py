"""A real HMM process and real clients: memory shared, budgets kept, calls waited for and repeated."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import msgspec
import pytest

from elasticmoe_sglang.errors import (
    BlockNotFound,
    BudgetExceeded,
    HmmError,
    MalformedMessage,
    ModelMismatch,
    RegionMismatch,
    SealTimeout,
    TransactionError,
    UserInputError,
)
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import HmmProcess
from elasticmoe_sglang.hmm.space import ColumnSpace
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from elasticmoe_sglang.wire import to_hmm
from elasticmoe_sglang.wire.envelope import Envelope
from tests.helpers.hmm_clients import MIB, MODEL, PAGE, Other, eventually, mapped_write, used

pytestmark = pytest.mark.usefixtures("gives_all_back")


# Sharing -------------------------------------------------------------------------------------------------------------


def test_two_processes_share_a_column_and_it_outlives_both(hmm: HmmProcess, client: HmmClient) -> None:
    client.register_model(MODEL)
    [block] = client.allocate(0, "column", columns=[5])
    assert (block.nbytes, block.column, block.sealed, block.txn) == (3 * PAGE, 5, False, None)
    mapped_write(client, block, b"weights")
    program = """
[block] = client.lookup(kind='column', columns=[5])
client.wait_sealed([block.block_id], 10)
va = mapped(block)
tell(ctypes.string_at(va.base, 7).decode())
ctypes.memmove(va.base + block.nbytes - 5, b'reply', 5)
tell('written'); wait()
"""
    with Other(hmm.endpoint, program) as other:
        time.sleep(0.1)
        client.seal([block.block_id])
        assert other.says() == "weights"
        assert other.says() == "written"
        [status] = [c for c in client.status().clients if c.name == "other"]
        assert (status.pid, status.leases) == (other.process.pid, 1)
    client.close()
    with HmmClient(hmm.endpoint, name="later", backend=CpuBackend()) as later:
        [found] = later.lookup(kind="column", device=0, columns=[4, 5])
        assert found.block_id == block.block_id and found.sealed
        [handle] = later.handles([found.block_id])
        assert os.pread(handle.native, 7, 0) == b"weights"
        assert os.pread(handle.native, 5, found.nbytes - 5) == b"reply"
        later.backend.close(handle)


def test_a_rank_pulls_columns_from_another_device(client: HmmClient) -> None:
    client.register_model(MODEL)
    sources = client.allocate(0, "column", columns=[2, 9])
    for block in sources:
        mapped_write(client, block, bytes([block.column or 0]) * MODEL.column_bytes)
    space = ColumnSpace(client.backend, MODEL.num_columns, MODEL.column_bytes)
    txn = client.begin("scale-up")
    targets = client.allocate(1, "column", columns=[2, 9], txn=txn)
    for source, target in zip(sources, targets, strict=True):
        assert target.column is not None and target.txn == txn
        handle, origin = client.handles([target.block_id, source.block_id])
        space.map_column(target.column, handle)
        assert space.pull(target.column, origin).complete
    client.release([block.block_id for block in sources], txn=txn)
    client.seal([block.block_id for block in targets])
    assert used(client) == [6 * PAGE, 6 * PAGE]
    report = client.commit(txn)
    assert (report.allocated_blocks, report.released_blocks) == (2, 2)
    assert report.peak_bytes == [6 * PAGE, 6 * PAGE]
    assert used(client) == [0, 6 * PAGE]
    assert all(block.txn is None and block.device == 1 for block in client.lookup(kind="column"))
    import ctypes

    assert ctypes.string_at(space.address(9), MODEL.column_bytes) == b"\x09" * MODEL.column_bytes
    space.close()


def test_more_blocks_than_descriptors_fit_a_packet(client: HmmClient) -> None:
    client.register_model(to_hmm.ModelSpec(fingerprint="many", num_columns=600, column_bytes=8, dense_bytes=8))
    blocks = client.allocate(0, "column", columns=range(600))
    handles = client.handles([block.block_id for block in blocks])
    assert len(handles) == 600 == client.status().clients[0].leases
    for handle in handles:
        client.backend.close(handle)
    assert client.status().clients[0].leases == 0


def test_regions_are_shared_by_name(hmm: HmmProcess, client: HmmClient) -> None:
    region = client.region("collective region", 1000)
    with region.map() as buffer:
        assert len(buffer) == 1000 and buffer[:] == bytes(1000)
        program = """
region = client.region('collective region', 1000)
with region.map() as buffer:
    buffer[990:] = b'0123456789'
region.close()
tell('done'); wait()
"""
        with Other(hmm.endpoint, program) as other:
            assert other.says() == "done"
            assert buffer[990:] == b"0123456789"
    with pytest.raises(RegionMismatch, match="'collective region' has 1000 bytes, 1001 were asked for"):
        client.region("collective region", 1001)
    status = client.status()
    assert [(r.name, r.nbytes) for r in status.regions] == [("collective region", 1000)] and status.host_bytes == PAGE
    assert used(client) == [0, 0]
    region.close()
    client.release([region.block_id])
    again = client.region("collective region", 1001)
    with again.map() as buffer:
        assert buffer[990:1000] == bytes(10)
    again.close()


# Budgets and transactions --------------------------------------------------------------------------------------------


def test_a_budget_is_refused_with_numbers_and_nothing_is_kept(client: HmmClient) -> None:
    client.register_model(MODEL)
    client.allocate(1, "kv", nbytes=2 * MIB - 5 * PAGE)
    with pytest.raises(BudgetExceeded) as caught:
        client.allocate(1, "column", columns=[0, 1])
    error = caught.value
    assert (error.device, error.needed, error.free, error.budget) == (1, 6 * PAGE, 5 * PAGE, 2 * MIB)
    assert f"by {PAGE} bytes" in str(error)
    assert client.lookup(kind="column") == []
    device = client.status().devices[1]
    assert (device.by_kind, device.free) == ({"kv": 2 * MIB - 5 * PAGE}, 5 * PAGE)
    client.allocate(1, "other", nbytes=5 * PAGE)
    assert client.status().devices[1].used == client.status().devices[1].peak == 2 * MIB


def test_requests_that_make_no_sense_are_refused(client: HmmClient) -> None:
    with pytest.raises(HmmError, match="no model registered"):
        client.allocate(0, "dense")
    client.register_model(MODEL)
    with pytest.raises(ModelMismatch):
        client.register_model(msgspec.structs.replace(MODEL, fingerprint="other"))
    for arguments in (
        {"device": 2, "kind": "kv", "nbytes": 1},
        {"device": 0, "kind": "column"},
        {"device": 0, "kind": "kv", "columns": [1], "nbytes": 1},
        {"device": 0, "kind": "column", "columns": [1, 1]},
        {"device": 0, "kind": "column", "columns": [16]},
        {"device": 0, "kind": "kv"},
    ):
        with pytest.raises(UserInputError):
            client.allocate(**arguments)  # type: ignore[arg-type]
    for call in (client.seal, client.release, client.handles):
        with pytest.raises(BlockNotFound, match="block 77 does not exist"):
            call([77])
    with pytest.raises(MalformedMessage, match="nbytes"):
        client.allocate(0, "kv", nbytes=-1)
    assert used(client) == [0, 0]


def test_rollback_frees_what_was_allocated_and_keeps_what_was_promised(client: HmmClient) -> None:
    [kept] = client.allocate(0, "kv", nbytes=PAGE)
    txn = client.begin("op-1")
    assert client.begin("op-1") == txn
    client.allocate(0, "kv", nbytes=7 * PAGE, txn=txn)
    client.release([kept.block_id], txn=txn)
    assert used(client)[0] == 8 * PAGE
    report = client.rollback(txn)
    assert report.outcome == "rolled_back" and report.peak_bytes[0] == 8 * PAGE
    assert client.rollback(txn) == report
    assert [block.block_id for block in client.lookup()] == [kept.block_id]
    with pytest.raises(TransactionError, match=r"it was rolled back.*op-1"):
        client.commit(txn)
    with pytest.raises(TransactionError, match="does not exist"):
        client.allocate(0, "kv", nbytes=PAGE, txn="9:nobody")


def test_only_the_owner_ends_a_transaction_but_all_may_allocate_in_it(hmm: HmmProcess, client: HmmClient) -> None:
    txn = client.begin("op")
    with HmmClient(hmm.endpoint, name="rank-1") as rank:
        rank.allocate(1, "kv", nbytes=PAGE, txn=txn)
        with pytest.raises(TransactionError, match="another client"):
            rank.commit(txn)
        with pytest.raises(TransactionError, match="another client"):
            rank.begin("op")
    assert used(client) == [0, PAGE]  # the rank is gone; the owner still decides
    client.rollback(txn)
    assert used(client) == [0, 0]


def test_a_transaction_ends_with_its_deadline(client: HmmClient) -> None:
    txn = client.begin("slow", timeout_s=1.0)
    client.allocate(0, "kv", nbytes=PAGE, txn=txn)
    [status] = client.status().txns
    assert (status.operation_id, status.owner, status.allocated_blocks) == ("slow", "rank-0", 1)
    assert 0 < status.expires_in_s <= 1.0
    eventually(lambda: used(client) == [0, 0])
    with pytest.raises(TransactionError, match="its deadline passed"):
        client.commit(txn)


# Waiting and retrying ------------------------------------------------------------------------------------------------


def test_waiting_for_a_seal(client: HmmClient) -> None:
    first, second = (client.allocate(0, "kv", nbytes=PAGE)[0].block_id for _ in range(2))
    client.seal([first])
    client.wait_sealed([first], 0)
    started = time.monotonic()
    with pytest.raises(SealTimeout, match=f"1 of 2 blocks were not sealed in time, such as block {second}"):
        client.wait_sealed([first, second], 0.2)
    assert 0.2 <= time.monotonic() - started < 3
    sealer = threading.Timer(0.1, client.seal, ([second],))
    sealer.start()
    client.wait_sealed([first, second], 5)
    sealer.join()
    [third] = client.allocate(0, "kv", nbytes=PAGE)
    releaser = threading.Timer(0.1, client.release, ([third.block_id],))
    releaser.start()
    with pytest.raises(BlockNotFound):
        client.wait_sealed([third.block_id], 5)
    releaser.join()


def test_a_repeated_command_is_executed_once(client: HmmClient) -> None:
    link = client._attached(time.monotonic() + 5)
    frame = to_hmm.COMMANDS.encode(Envelope(request_id="again", body=to_hmm.Allocate(device=0, kind="kv", nbytes=PAGE)))
    with link._socket() as sock:
        replies = []
        for _ in range(3):
            sock.send(frame)
            assert sock.poll(5000)
            replies.append(to_hmm.ANSWERS.decode(sock.recv()).body)
    assert replies[0] == replies[1] == replies[2]
    status = client.status()
    assert (status.blocks, status.counters.replayed) == (1, 2)


def test_one_client_serves_many_threads(client: HmmClient) -> None:
    errors: list[Exception] = []

    def work(device: int) -> None:
        try:
            for _ in range(25):
                [block] = client.allocate(device, "kv", nbytes=PAGE)
                [handle] = client.handles([block.block_id])
                client.backend.close(handle)
                client.release([block.block_id])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors and used(client) == [0, 0]


def test_calls_from_coroutines_overlap(hmm: HmmProcess, client: HmmClient) -> None:
    async def drive() -> None:
        txn = await asyncio.to_thread(client.begin, "op")
        [block] = await asyncio.to_thread(client.allocate, 0, "kv", nbytes=PAGE, txn=txn)
        waiting = asyncio.create_task(asyncio.to_thread(client.wait_sealed, [block.block_id], 0.3))
        found, status = await asyncio.gather(
            asyncio.to_thread(client.lookup, kind="kv"), asyncio.to_thread(client.status)
        )
        assert found == [block] and status.blocks == 1
        with pytest.raises(SealTimeout):
            await waiting
        assert (await asyncio.to_thread(client.commit, txn)).outcome == "committed"
        await asyncio.to_thread(client.release, [block.block_id])

    asyncio.run(drive())
