"""A real HMM process that owns NPU memory, and clients with the real torch_npu."""

import ctypes
import subprocess
import sys

import pytest
import torch

from elasticmoe_sglang.errors import BudgetExceeded
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.hmm.vmm import get_backend
from elasticmoe_sglang.wire.to_hmm import ModelSpec

pytestmark = pytest.mark.toolchain

M = 2 << 20


@pytest.fixture
def hmm(tmp_path):
    with spawn_hmm(f"ipc://{tmp_path}/run/hmm.sock", [16 * M, 16 * M], backend="npu") as process:
        yield process


def test_columns_belong_to_the_hmm(hmm) -> None:
    backend = get_backend("npu")
    with HmmClient(hmm.endpoint, name="rank-0", timeout_s=20, backend=backend) as client:
        client.register_model(ModelSpec(fingerprint="check", num_columns=8, column_bytes=M, dense_bytes=M, detail={}))
        blocks = client.allocate(0, "column", columns=[3, 5])
        with pytest.raises(BudgetExceeded):
            client.allocate(0, "other", nbytes=64 * M)
        handles = client.handles([block.block_id for block in blocks])
        va = backend.reserve(8 * M)
        for block, handle in zip(blocks, handles, strict=True):
            assert handle.imported
            backend.map(va.base + block.column * M, handle)
            backend.close(handle)
        weights = torch.empty(0, dtype=torch.bfloat16, device="npu:0")
        weights.set_(backend.storage(va.base, 8 * M, 0), 0, (8, M // 2))
        for column in (3, 5):
            weights[column].copy_(torch.full((M // 2,), float(column), dtype=torch.bfloat16))
        client.seal([block.block_id for block in blocks])

        # Another process sees the bytes, and they outlive the first one's mapping.
        for column in (3, 5):
            backend.unmap(va.base + column * M, M)
        backend.release_va(va)
        assert reader(hmm.endpoint) == "[3.0, 5.0]"
        assert client.status().devices[0].used == 2 * M


def reader(endpoint: str) -> str:
    program = f"""
import torch, torch_npu
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.vmm import get_backend
torch.npu.set_device(0)
backend, M = get_backend("npu"), {M}
with HmmClient({endpoint!r}, name="rank-1", timeout_s=20, backend=backend) as client:
    blocks = client.lookup(kind="column", columns=[3, 5])
    client.wait_sealed([block.block_id for block in blocks], 5)
    va = backend.reserve(len(blocks) * M)
    for place, handle in enumerate(client.handles([block.block_id for block in blocks])):
        backend.map(va.base + place * M, handle)
        backend.close(handle)
    tensor = torch.empty(0, dtype=torch.bfloat16, device="npu:0")
    tensor.set_(backend.storage(va.base, 2 * M, 0), 0, (2, M // 2))
    print([tensor[place, -1].cpu().item() for place in range(2)])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_a_transaction_gives_everything_back(hmm) -> None:
    with HmmClient(hmm.endpoint, name="rank-0", timeout_s=20, backend=get_backend("npu")) as client:
        txn = client.begin("scale-1")
        client.allocate(1, "other", nbytes=8 * M, txn=txn)
        assert client.status().devices[1].used == 8 * M
        client.rollback(txn)
        assert client.status().devices[1].used == 0
        client.allocate(1, "other", nbytes=16 * M)  # the device itself has the room again


def test_windows_are_host_memory(hmm) -> None:
    with HmmClient(hmm.endpoint, name="rank-0", timeout_s=20, backend=get_backend("npu")) as client:
        region = client.region("collective region", 4096)
        with region.map() as buffer:
            ctypes.memmove((ctypes.c_char * 5).from_buffer(buffer), b"hello", 5)
        again = client.region("collective region", 4096)
        with again.map() as buffer:
            assert buffer[:5] == b"hello"
        region.close()
        again.close()
