"""An HMM is killed: what its clients have mapped stays theirs, and the next HMM takes it over from them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from elasticmoe_sglang.errors import BudgetExceeded, HmmUnavailable, ProtocolError, RegionMismatch
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from elasticmoe_sglang.wire import to_hmm
from tests.helpers.leaks import no_leaks

PAGE = CpuBackend().granularity
BUDGETS = (64 * PAGE, 64 * PAGE)
MODEL = to_hmm.ModelSpec(fingerprint="m", num_columns=16, column_bytes=2 * PAGE - 5, dense_bytes=PAGE)
REGION_BYTES = 1000

# A rank: takes its device's dense block and columns, or maps those of another rank there, and does what it is told.
RANK = """
import ctypes, sys
from elasticmoe_sglang.errors import ElasticMoEError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.wire.to_hmm import ModelSpec

endpoint, name, device, columns = sys.argv[1], sys.argv[2], int(sys.argv[3]), [int(c) for c in sys.argv[4:]]
client = HmmClient(endpoint, name=name)
client.register_model(ModelSpec(fingerprint="m", num_columns=16, column_bytes=COLUMN, dense_bytes=DENSE))
backend, mapped, regions = client.backend, {}, []

def put(blocks, fill):
    for block, handle in zip(blocks, client.handles([b.block_id for b in blocks])):
        va = backend.reserve(block.nbytes)
        backend.map(va.base, handle)
        backend.close(handle)
        mapped[block.block_id] = (va, block)
        if fill:
            ctypes.memset(va.base, 100 + (block.column or 0), block.nbytes)

def take():
    new = client.allocate(device, "dense") + client.allocate(device, "column", columns=columns)
    put(new, True)
    client.seal([b.block_id for b in new])

def share():
    put(client.lookup(kind="dense", device=device), False)
    put(client.lookup(kind="column", device=device, columns=columns), False)

def begin():
    put(client.allocate(device, "kv", nbytes=5000, txn=client.begin("change")), True)

def region():
    regions.append(client.region("collective region", 1000))

def unmap():
    for va, block in mapped.values():
        backend.unmap(va.base, block.nbytes)
    mapped.clear()

def check():
    for va, block in mapped.values():
        assert ctypes.string_at(va.base, block.nbytes) == bytes([100 + (block.column or 0)]) * block.nbytes

print("ready", flush=True)
for line in sys.stdin:
    try:
        done = eval(line)
    except ElasticMoEError as error:
        done = f"{type(error).__name__}: {error}"
    print(done, flush=True)
"""


class Worker:
    """A client in a process of its own."""

    def __init__(self, endpoint: str, name: str, device: int, columns: Sequence[int]) -> None:
        sizes = f"COLUMN, DENSE = {MODEL.column_bytes}, {MODEL.dense_bytes}\n"
        command = [sys.executable, "-c", sizes + RANK, endpoint, name, str(device), *map(str, columns)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def does(self, expression: str) -> str:
        """The value, or the error that it raised, as text."""
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the rank has ended"
        return line.strip()

    def descriptors(self) -> int:
        """Open descriptors of the HMM's memory."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        return sum(os.readlink(fd).startswith("/memfd:elasticmoe") for fd in folder.iterdir())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    with no_leaks():
        yield


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/run/hmm.sock"


def start(endpoint: str, budgets: Sequence[int] = BUDGETS) -> HmmProcess:
    return spawn_hmm(endpoint, budgets)


def kill(hmm: HmmProcess) -> None:
    hmm.process.send_signal(signal.SIGKILL)
    hmm.process.wait(5)


def usage(client: HmmClient) -> list[tuple[int, dict[str, int]]]:
    return [(device.used, device.by_kind) for device in client.status().devices]


def content(client: HmmClient, block: to_hmm.Block) -> bytes:
    [handle] = client.handles([block.block_id])
    va = client.backend.reserve(block.nbytes)
    try:
        client.backend.map(va.base, handle)
        client.backend.close(handle)
        data = ctypes.string_at(va.base, block.nbytes)
        client.backend.unmap(va.base, block.nbytes)
    finally:
        client.backend.release_va(va)
    return data


def test_next_hmm_has_the_same_ledger_and_bytes(endpoint: str) -> None:
    with (
        start(endpoint) as first,
        Worker(endpoint, "rank-0", 0, [0, 1, 2]) as zero,
        Worker(endpoint, "rank-1", 1, [3, 4]) as one,
        Worker(endpoint, "rank-2", 1, [4]) as shares,
    ):
        assert zero.does("take()") == one.does("take()") == shares.does("share()") == "None"
        assert zero.does("region()") == "None"
        with HmmClient(endpoint, name="before") as client:
            ledger, blocks = usage(client), client.lookup()
            status = client.status()
        assert status.adopted_blocks == 0 and len(blocks) == 8
        assert zero.descriptors() == 6, "one of each mapped block; the region's handle is open besides"

        kill(first)
        assert zero.does("check()") == one.does("check()") == "None", "mapped memory outlives the HMM"
        assert zero.does("client.attached_to()") == "None"
        assert zero.does("client.status()").startswith("HmmUnavailable: no HMM answers"), "nothing hangs"

        with start(endpoint) as second, HmmClient(endpoint, name="third") as client:
            assert usage(client) == [(0, {}), (0, {})]
            assert [zero.does("client.offer()"), one.does("client.offer()")] == ["5", "3"]
            assert shares.does("client.offer()") == "0", "two ranks of a device offer the same blocks"
            assert zero.does("client.offer()") == "0", "nothing is offered twice"
            assert (usage(client), client.lookup()) == (ledger, blocks)
            after = client.status()
            assert after.model == MODEL and after.adopted_blocks == 8
            assert after.regions == status.regions and after.host_bytes == status.host_bytes
            assert sorted((c.name, c.leases) for c in after.clients) == [
                ("rank-0", 5),
                ("rank-1", 3),
                ("rank-2", 2),
                ("third", 0),
            ]
            columns = client.lookup(kind="column")
            assert [content(client, block) for block in columns] == [
                bytes([100 + (block.column or 0)]) * block.nbytes for block in columns
            ]
            with pytest.raises(RegionMismatch):
                client.region("collective region", REGION_BYTES + 1)
            client.region("collective region", REGION_BYTES).close()
            assert zero.descriptors() == 6

            # From here on it is an HMM like any other: what is released goes when the last client has unmapped it.
            client.release([block.block_id for block in blocks if block.device == 1])
            assert one.does("unmap()") == "None" and one.does("len(client.lookup())") == "5"
            assert usage(client)[1] == (3 * PAGE, {"dense": PAGE, "column": 2 * PAGE}), "the third rank maps it still"
            assert shares.does("unmap()") == "None" and shares.does("client.held()") == "0"
            assert shares.descriptors() == one.descriptors() == 0
            assert shares.does("len(client.lookup())") == "5"
            assert usage(client) == [ledger[0], (0, {})] and client.status().retired_blocks == 0
            assert second.alive()


def test_blocks_outlive_two_hmms_and_a_client_that_came_late(endpoint: str) -> None:
    with (
        start(endpoint) as first,
        Worker(endpoint, "rank-0", 0, [0]) as zero,
        Worker(endpoint, "rank-1", 0, [0]) as one,
    ):
        assert zero.does("take()") == one.does("share()") == "None"
        kill(first)
        second = start(endpoint)
        assert zero.does("client.offer()") == "2"
        kill(second)
        with start(endpoint), HmmClient(endpoint, name="check") as client:
            assert one.does("client.offer()") == "2", "it never spoke to the second HMM"
            assert zero.does("client.offer()") == "0"
            assert usage(client) == [(3 * PAGE, {"dense": PAGE, "column": 2 * PAGE}), (0, {})]
            [column] = client.lookup(kind="column")
            assert column.sealed and one.does("check()") == "None"


def test_an_open_transaction_ends_with_its_hmm(endpoint: str) -> None:
    with start(endpoint) as first, Worker(endpoint, "rank-0", 0, []) as rank:
        assert rank.does("begin()") == "None"
        kill(first)
        with start(endpoint), HmmClient(endpoint, name="check") as client:
            assert rank.does("client.offer()") == "1"
            [block] = client.lookup()
            assert block.txn is None and client.status().txns == []
            client.release([block.block_id])
            assert rank.does("unmap()") == rank.does("client.status() and None") == "None"
            assert usage(client)[0] == (0, {})


def test_another_model_and_too_small_a_budget(endpoint: str) -> None:
    with start(endpoint) as first, Worker(endpoint, "rank-0", 0, [0, 1]) as rank:
        assert rank.does("take()") == "None"
        kill(first)
        with start(endpoint) as other:
            with HmmClient(endpoint, name="check") as client:
                client.register_model(
                    to_hmm.ModelSpec(fingerprint="o", num_columns=16, column_bytes=PAGE, dense_bytes=PAGE)
                )
                assert rank.does("client.offer()").startswith("ModelMismatch: the HMM holds another model")
                assert usage(client)[0] == (0, {})
            kill(other)
        with start(endpoint, (2 * PAGE, PAGE)), HmmClient(endpoint, name="check") as client:
            assert rank.does("client.offer()") == "3"
            assert client.status().devices[0].free == -3 * PAGE, "in use is in use"
            with pytest.raises(BudgetExceeded):
                client.allocate(0, "kv", nbytes=1)


def test_offers_that_are_not_what_they_say_are_refused(endpoint: str) -> None:
    with start(endpoint), HmmClient(endpoint, name="liar") as client:
        [block] = client.allocate(0, "kv", nbytes=PAGE)
        [handle] = client.handles([block.block_id])
        link = client._attached(client._deadline())

        def offer(fds: Sequence[int], **changes: object) -> None:
            link.adopt(
                None,
                [
                    to_hmm.Offer(
                        block=to_hmm.Block(**({"block_id": 7, "device": 0, "kind": "kv", "nbytes": PAGE} | changes))
                    )
                ],
                fds,
                client._deadline(),
            )

        with pytest.raises(ProtocolError, match="1 blocks were offered with 0 descriptors"):
            offer([])
        with pytest.raises(Exception, match="the descriptor holds"):
            offer([handle.native], nbytes=2 * PAGE)
        with pytest.raises(ProtocolError, match=f"block {block.block_id} was offered with kind dense"):
            offer([handle.native], block_id=block.block_id, kind="dense")
        with pytest.raises(Exception, match="device 9 does not exist"):
            offer([handle.native], device=9)
        assert client.status().blocks == 1 and usage(client)[0] == (PAGE, {"kv": PAGE})
        client.backend.close(handle)


def test_without_an_hmm_offering_says_so(endpoint: str) -> None:
    with HmmClient(endpoint, name="alone", timeout_s=0.2) as client:
        assert client.attached_to() is None
        with pytest.raises(HmmUnavailable):
            client.offer()
