"""A real HMM process and real client processes: memory shared, deaths survived, nonsense answered, nothing leaked."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from elasticmoe_sglang.errors import (
    BlockNotFound,
    BudgetExceeded,
    ElasticMoEError,
    HmmError,
    HmmUnavailable,
    MalformedMessage,
    ModelMismatch,
    ProtocolError,
    RegionMismatch,
    SealTimeout,
    TransactionError,
    UserInputError,
)
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.config import Endpoint, HmmConfig
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from elasticmoe_sglang.hmm.server import HmmServer
from elasticmoe_sglang.hmm.space import ColumnSpace
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from elasticmoe_sglang.wire import to_hmm
from elasticmoe_sglang.wire.envelope import Envelope, ErrorReply, error_from
from elasticmoe_sglang.wire.seqpacket import new_socket, receive_packet, send_packet
from tests.helpers.leaks import holdings

PAGE = CpuBackend().granularity
MIB = 1 << 20
BUDGETS = (4 * MIB, 2 * MIB)
MODEL = to_hmm.ModelSpec(fingerprint="m", num_columns=16, column_bytes=3 * PAGE - 7, dense_bytes=PAGE)


def descriptors(pid: int | None = None) -> Counter[str]:
    """What the process's descriptors point to; /dev/shm, which other programs use too, is of no concern here."""
    return holdings(pid).descriptors


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Every test gives back its descriptors and waits for its processes."""
    before = replace(holdings(), shm_files=frozenset())
    yield
    gc.collect()
    eventually(lambda: not replace(holdings(), shm_files=frozenset()).beyond(before))


@pytest.fixture
def hmm(tmp_path: Path) -> Iterator[HmmProcess]:
    with spawn_hmm(f"ipc://{tmp_path}/run/hmm.sock", BUDGETS, log_path=tmp_path / "hmm.log") as process:
        yield process
        assert process.alive(), (tmp_path / "hmm.log").read_text()
        with HmmClient(process.endpoint, name="check") as check:
            assert check.status().counters.internal_errors == 0, (tmp_path / "hmm.log").read_text()
    assert process.process.returncode == 0
    assert list((tmp_path / "run").iterdir()) == []


@pytest.fixture
def client(hmm: HmmProcess) -> Iterator[HmmClient]:
    backend = CpuBackend()
    with HmmClient(hmm.endpoint, name="rank-0", backend=backend) as client:
        yield client


class Other:
    """A second client in a process of its own: it prints a line where it `tell`s, and waits for one at `wait()`."""

    def __init__(self, endpoint: str, program: str) -> None:
        setup = (
            "import ctypes, os, sys\n"
            "from elasticmoe_sglang.hmm.client import HmmClient\n"
            f"client = HmmClient({endpoint!r}, name='other'); backend = client.backend\n"
            "def tell(text): print(text, flush=True)\n"
            "def wait(): sys.stdin.readline()\n"
            "def mapped(block):\n"
            "    va, [handle] = backend.reserve(block.nbytes), client.handles([block.block_id])\n"
            "    backend.map(va.base, handle); backend.close(handle); return va\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", setup + program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def says(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def eventually(condition: Any, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def used(client: HmmClient) -> list[int]:
    return [device.used for device in client.status().devices]


def mapped_write(client: HmmClient, block: to_hmm.Block, data: bytes) -> None:
    import ctypes

    [handle] = client.handles([block.block_id])
    va = client.backend.reserve(block.nbytes)
    client.backend.map(va.base, handle)
    client.backend.close(handle)
    ctypes.memmove(va.base, data, len(data))
    client.backend.unmap(va.base, block.nbytes)
    client.backend.release_va(va)


# Sharing -------------------------------------------------------------------------------------------------------


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


# Budgets and transactions --------------------------------------------------------------------------------------


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


# Deaths --------------------------------------------------------------------------------------------------------


def test_a_killed_client_loses_its_transaction_and_leases_but_no_committed_block(
    hmm: HmmProcess, client: HmmClient
) -> None:
    program = f"""
[mine] = client.allocate(0, 'kv', nbytes={PAGE})
va = mapped(mine)
ctypes.memmove(va.base, b'kept', 4)
txn = client.begin('doomed')
blocks = client.allocate(1, 'kv', nbytes={10 * PAGE}, txn=txn)
other = mapped(blocks[0])
tell(mine.block_id); wait()
"""
    with Other(hmm.endpoint, program) as other:
        block_id = int(other.says())
        assert used(client) == [PAGE, 10 * PAGE]
        other.process.send_signal(signal.SIGKILL)
        eventually(lambda: used(client) == [PAGE, 0])
    status = client.status()
    assert not status.txns and [c.name for c in status.clients] == ["rank-0"]
    [handle] = client.handles([block_id])
    assert os.pread(handle.native, 4, 0) == b"kept"
    client.backend.close(handle)


def test_released_memory_stays_charged_until_the_last_client_unmapped_it(hmm: HmmProcess, client: HmmClient) -> None:
    [block] = client.allocate(0, "kv", nbytes=4 * PAGE)
    program = (
        f"va = mapped(client.lookup()[0])\ntell('m'); wait()\nbackend.unmap(va.base, {4 * PAGE})\ntell('u'); wait()"
    )
    with Other(hmm.endpoint, program) as other:
        assert other.says() == "m"
        client.release([block.block_id])
        status = client.status()
        assert (status.blocks, status.retired_blocks, status.devices[0].used) == (0, 1, 4 * PAGE)
        with pytest.raises(BlockNotFound):
            client.handles([block.block_id])
        other.go_on()
        assert other.says() == "u"
        # The HMM hears of it on another socket than the one that asks.
        eventually(lambda: client.status().retired_blocks == 0)
        assert used(client)[0] == 0


def test_a_forked_child_is_told_to_make_its_own_client_and_keeps_nobody_attached(
    hmm: HmmProcess, client: HmmClient
) -> None:
    program = """
client.status()
child = os.fork()
if child == 0:
    try:
        client.status()
    except Exception as error:
        tell(f'{type(error).__name__}: {error}')
    with HmmClient(client.endpoint, name='child') as mine:
        mine.status()
    wait()  # outlives its parent
    os._exit(0)
tell(child)
os._exit(0)
"""
    with Other(hmm.endpoint, program) as other:
        lines = sorted([other.says(), other.says()])
        assert "A forked child makes its own HmmClient" in lines[1]
        other.process.wait(10)
        eventually(lambda: [c.name for c in client.status().clients] == ["rank-0"])
        other.go_on()
        other.process.communicate()


def test_a_dead_hmm_is_reported_at_once_and_a_new_one_is_found(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/run/hmm.sock"
    client = HmmClient(endpoint, name="rank-0", timeout_s=5, backend=CpuBackend())
    with pytest.raises(HmmUnavailable, match=r"no HMM answers.*elasticmoe hmm --endpoint"):
        client.status()
    with spawn_hmm(endpoint, [MIB], log_path=tmp_path / "log") as first:
        instance = client.status().instance
        [block] = client.allocate(0, "kv", nbytes=PAGE)
        [handle] = client.handles([block.block_id])
        os.kill(first.pid, signal.SIGKILL)
        first.process.wait(5)
        started = time.monotonic()
        with pytest.raises(HmmUnavailable):
            client.status()
        assert time.monotonic() - started < 3
        assert os.pread(handle.native, 4, 0) == bytes(4)  # the client's memory is still its own
    with spawn_hmm(endpoint, [MIB], log_path=tmp_path / "log"):  # stale files are no obstacle
        assert client.connect(wait_s=5).instance != instance
        client.backend.close(handle)  # belongs to the dead one; the new one must not hear of it
        assert client.status().counters.malformed == 0
        client.close()


def test_a_call_in_flight_ends_when_the_hmm_dies(tmp_path: Path) -> None:
    with spawn_hmm(f"ipc://{tmp_path}/run/hmm.sock", [MIB], log_path=tmp_path / "log") as process:
        client = HmmClient(process.endpoint, name="rank-0")
        [block] = client.allocate(0, "kv", nbytes=PAGE)
        killer = threading.Timer(0.2, process.process.kill)
        killer.start()
        with pytest.raises(HmmUnavailable, match="is gone"):
            client.wait_sealed([block.block_id], 30)
        killer.join()
        client.close()


def test_a_stopped_hmm_costs_a_deadline_and_no_more(hmm: HmmProcess) -> None:
    with HmmClient(hmm.endpoint, name="hasty", timeout_s=0.3) as client:
        [block] = client.allocate(0, "kv", nbytes=PAGE)
        os.kill(hmm.pid, signal.SIGSTOP)
        try:
            for call in (client.status, lambda: client.handles([block.block_id])):
                started = time.monotonic()
                with pytest.raises(HmmUnavailable, match=r"did not answer .* in time"):
                    call()
                assert 0.3 <= time.monotonic() - started < 3
        finally:
            os.kill(hmm.pid, signal.SIGCONT)
        # The answers that came too late are dropped, descriptors and leases with them.
        [handle] = client.handles([block.block_id])
        assert client.status().clients[0].leases == 1
        client.backend.close(handle)
        assert client.status().clients[0].leases == 0


# Waiting and retrying ------------------------------------------------------------------------------------------


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


# Nonsense and intruders ----------------------------------------------------------------------------------------


def test_malformed_commands_get_typed_errors_and_are_counted(hmm: HmmProcess, client: HmmClient) -> None:

    def ask(*frames: bytes) -> tuple[str, ElasticMoEError]:
        sock.send_multipart(frames)
        assert sock.poll(5000), "no answer"
        answer = to_hmm.ANSWERS.decode(sock.recv())
        assert isinstance(answer.body, ErrorReply)
        return answer.request_id, error_from(answer.body)

    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        sock.connect(hmm.endpoint)
        nonsense = [
            (b"",),
            (b"\xc1",),
            (os.urandom(500),),
            (b"\x91" * 10_000,),
            (bytes(2 << 20),),
            (b"two", b"frames"),
            (b"", to_hmm.COMMANDS.encode(Envelope(request_id="r", body=to_hmm.StatusRequest()))),
            (b"a",) * 50,
        ]
        for frames in nonsense:
            request_id, error = ask(*frames)
            assert isinstance(error, MalformedMessage) and request_id == "?"
        bad_body = msgspec.msgpack.encode({"version": 1, "request_id": "r9", "body": {"type": "Nope"}})
        request_id, error = ask(bad_body)
        assert request_id == "r9" and isinstance(error, MalformedMessage)
        request_id, error = ask(to_hmm.COMMANDS.encode(Envelope(request_id="r10", body=to_hmm.StatusRequest())))
        assert request_id == "r10" and "not attached" in str(error)
        sock.send(bytes(20 << 20))  # libzmq drops who sends this much
        assert not sock.poll(200)
    assert client.status().counters.malformed == len(nonsense) + 1


def test_malformed_packets_get_typed_errors_and_are_counted(hmm: HmmProcess, client: HmmClient) -> None:

    def ask(packet: bytes, *fds: int) -> ElasticMoEError | None:
        send_packet(sock, packet, fds)
        eventually(lambda: select_readable(sock))
        reply, _ = receive_packet(sock)
        body = to_hmm.LINK_REPLIES.decode(reply).body
        return error_from(body) if isinstance(body, ErrorReply) else None

    def request(body: to_hmm.LinkRequest) -> bytes:
        return to_hmm.LINK_REQUESTS.encode(Envelope(request_id="r", body=body))

    client.status()
    before = len(os.listdir(f"/proc/{hmm.pid}/fd"))
    sock = new_socket()
    sock.connect(str(Endpoint.parse(hmm.endpoint).handles))
    assert isinstance(ask(b"\xc1 nonsense"), MalformedMessage)
    assert "must be Attach" in str(ask(request(to_hmm.FetchHandles(block_ids=[1]))))
    assert ask(request(to_hmm.Attach(name="odd"))) is None
    assert "second Attach" in str(ask(request(to_hmm.Attach(name="odd"))))
    assert isinstance(ask(request(to_hmm.ReturnLeases(block_ids=[1]))), ProtocolError)
    assert isinstance(ask(request(to_hmm.FetchHandles(block_ids=[404]))), BlockNotFound)
    # Descriptors that nobody asked for are closed.
    gift = os.open(os.devnull, os.O_RDONLY)
    assert isinstance(ask(b"\xc1", *[gift] * 253), MalformedMessage)
    os.close(gift)
    assert len(os.listdir(f"/proc/{hmm.pid}/fd")) == before + 1
    assert client.status().counters.malformed == 2
    sock.close()
    eventually(lambda: [c.name for c in client.status().clients] == ["rank-0"])


def select_readable(sock: socket.socket) -> bool:
    import select

    return bool(select.select([sock], [], [], 0)[0])


def test_a_return_that_is_refused_answers_nothing_else(client: HmmClient) -> None:
    [block] = client.allocate(0, "kv", nbytes=PAGE)
    client._attached(client._deadline()).return_leases([block.block_id])  # which it does not hold
    [handle] = client.handles([block.block_id])
    client.backend.close(handle)


def test_a_client_that_never_reads_its_handles_is_dropped(hmm: HmmProcess, client: HmmClient) -> None:
    [block] = client.allocate(0, "kv", nbytes=PAGE)
    sock = new_socket()
    sock.connect(str(Endpoint.parse(hmm.endpoint).handles))
    send_packet(sock, to_hmm.LINK_REQUESTS.encode(Envelope(request_id="r", body=to_hmm.Attach(name="deaf"))))
    frame = to_hmm.LINK_REQUESTS.encode(Envelope(request_id="r", body=to_hmm.FetchHandles(block_ids=[block.block_id])))
    dropped = False
    for _ in range(5000):
        try:
            send_packet(sock, frame)
        except BlockingIOError:
            time.sleep(0.001)
        except OSError:
            dropped = True
            break
    assert dropped
    assert [c.name for c in client.status().clients] == ["rank-0"]
    assert client.status().retired_blocks == 0
    sock.close()


def test_a_link_that_says_nothing_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elasticmoe_sglang.hmm.server_links._ATTACH_S", 0.2)
    with in_thread(tmp_path) as server:
        sock = new_socket()
        sock.connect(str(Endpoint.parse(server.service.endpoint).handles))
        eventually(lambda: select_readable(sock))
        assert receive_packet(sock) == (b"", [])
        sock.close()


def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elasticmoe_sglang.hmm.server_links.peer_credentials", lambda sock: (4711, os.getuid() + 1))
    with in_thread(tmp_path) as server:
        with (
            HmmClient(server.service.endpoint, name="intruder", timeout_s=2) as client,
            pytest.raises(HmmError, match=f"user {os.getuid() + 1} may not use the HMM of user {os.getuid()}"),
        ):
            client.status()
        assert server.service.counters.refused_peers == 1


class in_thread:
    """A server inside this process, for what needs patching."""

    def __init__(self, tmp_path: Path) -> None:
        self.server = HmmServer(HmmConfig(endpoint=f"ipc://{tmp_path}/run/hmm.sock", budgets=(MIB,)))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> HmmServer:
        self.thread.start()
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.server.close()


# The process and its files -------------------------------------------------------------------------------------


def test_files_are_private_and_names_are_not_abstract(hmm: HmmProcess) -> None:
    endpoint = Endpoint.parse(hmm.endpoint)
    assert stat.S_IMODE(endpoint.commands.parent.stat().st_mode) == 0o700
    for path in (endpoint.commands, endpoint.handles, endpoint.lock):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    bound = [line.split()[-1] for line in Path(f"/proc/{hmm.pid}/net/unix").read_text().splitlines()]
    assert str(endpoint.commands) in bound and str(endpoint.handles) in bound
    for wrong in ("ipc://@hmm", "tcp://127.0.0.1:1", "/tmp/x", f"ipc:///tmp/{'x' * 120}"):
        with pytest.raises(UserInputError):
            HmmClient(wrong, name="x")


def test_one_endpoint_has_one_hmm(hmm: HmmProcess, tmp_path: Path) -> None:
    with pytest.raises(HmmUnavailable, match="ended with status 2 before it was ready"):
        spawn_hmm(hmm.endpoint, BUDGETS, log_path=tmp_path / "second.log")
    assert "an HMM already serves at" in (tmp_path / "second.log").read_text()
    with HmmClient(hmm.endpoint, name="x") as client:
        assert client.status().pid == hmm.pid


def test_a_folder_open_to_others_and_files_in_the_way_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    with pytest.raises(UserInputError, match=f"is open to others.*chmod 700 {folder}"):
        HmmServer(HmmConfig(endpoint=f"ipc://{folder}/hmm.sock", budgets=(MIB,)))
    folder.chmod(0o700)
    (folder / "hmm.sock").write_text("precious")
    with pytest.raises(UserInputError, match="is in the way and is no socket"):
        HmmServer(HmmConfig(endpoint=f"ipc://{folder}/hmm.sock", budgets=(MIB,)))
    assert (folder / "hmm.sock").read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(tmp_path: Path, number: int) -> None:
    process = spawn_hmm(f"ipc://{tmp_path}/run/hmm.sock", [MIB], log_path=tmp_path / "log")
    os.kill(process.pid, number)
    assert process.process.wait(5) == 0
    assert list((tmp_path / "run").iterdir()) == []


def test_it_ends_with_its_parent_and_only_when_asked_to(tmp_path: Path) -> None:
    program = f"""
import os, threading
from pathlib import Path
from elasticmoe_sglang.hmm.process import spawn_hmm
pids = []
def start(name, bound):
    log = Path({str(tmp_path)!r}, name + '.log')
    pids.append(spawn_hmm(f'ipc://{tmp_path}/{{name}}/h', [1 << 20], exit_with_parent=bound, log_path=log).pid)
# The thread that starts them ends first, which the kernel mistakes for the parent's end.
for arguments in (('bound', True), ('free', False)):
    thread = threading.Thread(target=start, args=arguments); thread.start(); thread.join()
import time; time.sleep(0.5)
print(pids, [Path(f'/proc/{{pid}}/comm').exists() for pid in pids], flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    pids, alive = (json.loads(part) for part in done.stdout.lower().replace("] [", "]|[").split("|"))
    assert alive == [True, True], done.stderr
    bound, free = pids
    try:
        eventually(lambda: not Path(f"/proc/{bound}").exists() or "Z" in Path(f"/proc/{bound}/stat").read_text())
        with HmmClient(f"ipc://{tmp_path}/free/h", name="x") as client:
            assert client.status().pid == free
    finally:
        os.kill(free, signal.SIGTERM)
    eventually(lambda: not (tmp_path / "free/h").exists())
    assert list((tmp_path / "bound").iterdir()) == []


def test_it_starts_without_torch_and_numpy() -> None:
    program = "import sys, elasticmoe_sglang.hmm.__main__; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_line(tmp_path: Path) -> None:
    from elasticmoe_sglang.hmm.__main__ import parse_config

    endpoint = f"ipc://{tmp_path}/h"
    config = parse_config(["--endpoint", endpoint, "--budget", "2GiB", "--devices", "3", "--backend", "cpu"])
    assert config == HmmConfig(endpoint=endpoint, budgets=(2 << 30,) * 3)
    assert parse_config(["--endpoint", endpoint, "--budget", "1MiB,2MiB"]).budgets == (MIB, 2 * MIB)
    assert parse_config(["--endpoint", endpoint, "--budget", "1MiB", "--exit-with-parent"]).exit_with_parent
    assert parse_config(["--endpoint", endpoint, "--budget", "1", "--exit-with-parent", "7"]).exit_with_parent == 7
    for arguments in (["--budget", "1MiB,2MiB", "--devices", "3"], ["--budget", "much"], ["--budget", "0"]):
        with pytest.raises(UserInputError):
            parse_config(["--endpoint", endpoint, *arguments])


# Leaks ---------------------------------------------------------------------------------------------------------


def test_nothing_is_left_in_the_hmm_after_many_rounds(hmm: HmmProcess) -> None:
    def one_round(number: int) -> None:
        with HmmClient(hmm.endpoint, name=f"round-{number}", backend=CpuBackend()) as client:
            client.register_model(MODEL)
            txn = client.begin(f"op-{number}")
            blocks = client.allocate(0, "column", columns=range(16), txn=txn)
            space = ColumnSpace(client.backend, 16, MODEL.column_bytes)
            for block, handle in zip(blocks, client.handles([b.block_id for b in blocks]), strict=True):
                space.map_column(block.column or 0, handle)
            if number % 2:
                client.commit(txn)
                client.release([block.block_id for block in blocks])
            elif number % 4:
                client.rollback(txn)
            if number % 3:
                space.close()
            # else: the mappings stay, and the client's end returns their leases

    with HmmClient(hmm.endpoint, name="watcher") as watcher:
        one_round(1)
        eventually(lambda: used(watcher) == [0, 0])
        before = descriptors(hmm.pid)
        for number in range(2, 22):
            one_round(number)
            eventually(lambda: used(watcher) == [0, 0])
        eventually(lambda: descriptors(hmm.pid) == before)
        status = watcher.status()
    assert (status.blocks, status.retired_blocks, len(status.txns)) == (0, 0, 0)
    assert status.devices[0].peak == 16 * 3 * PAGE
