"""What the contract suite (`test_vmm.py`, rig "cuda") does not ask: contexts, streams, tensors, errors."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from elasticmoe_sglang.errors import DriverError, OutOfDeviceMemory, VmmError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.layout import ColumnLayout
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.hmm.space import ColumnSpace
from elasticmoe_sglang.hmm.vmm import VmmBackend, VmmUsage
from elasticmoe_sglang.hmm.vmm.cuda import CudaBackend

pytestmark = pytest.mark.gpu
NOTHING = VmmUsage(reserved_bytes=0, mapped_bytes=0, mappings=0, open_handles=0)


@pytest.fixture
def backend() -> Iterator[CudaBackend]:
    try:
        made = CudaBackend()
    except DriverError as error:
        pytest.skip(f"needs an NVIDIA GPU: {error}")
    yield made
    gc.collect()
    assert made.usage() == NOTHING, "the test left memory behind"


CONTEXT_FREE = """
import os
from elasticmoe_sglang.hmm.vmm import get_backend
backend = get_backend("cuda"); size = 64 << 20
handle = backend.create(size, 0)
fd = backend.export(handle)
again = backend.import_(os.dup(fd), size, 0)
va = backend.reserve(2 * size)
backend.map(va.base, handle); backend.map(va.base + size, again)
backend.unmap(va.base, size); backend.unmap(va.base + size, size)
backend.close(handle); backend.close(again); backend.release_va(va); os.close(fd)
print(backend.active_devices(), backend.usage().open_handles)
"""


def test_memory_is_made_shared_and_mapped_without_a_context(backend: CudaBackend) -> None:
    done = subprocess.run([sys.executable, "-c", CONTEXT_FREE], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[] 0", done.stdout + done.stderr


def test_the_hmm_holds_no_context_and_its_memory_is_zero_when_reused(backend: CudaBackend, tmp_path) -> None:
    import torch

    nbytes = 512 << 20
    with spawn_hmm(f"ipc://{tmp_path}/h.sock", [2 << 30], backend="cuda") as hmm:
        with HmmClient(hmm.endpoint, name="test", backend=backend) as client:
            for turn in range(4):
                [block] = client.allocate(0, "other", nbytes=nbytes)
                space = ColumnSpace(backend, 1, nbytes)
                [handle] = client.handles([block.block_id])
                space.map_column(0, handle)
                view = space.views(ColumnLayout.of([("x", (nbytes // 8,), "int64")]))["x"]
                assert int(torch.count_nonzero(view)) == 0, f"memory of turn {turn} holds what the last owner wrote"
                view.fill_(-1)
                torch.cuda.synchronize()
                del view
                gc.collect()
                space.close()
                client.release([block.block_id])
        listing = subprocess.run(
            ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], capture_output=True, text=True
        )
        assert str(hmm.pid) not in listing.stdout.split(), "the HMM has a context on the GPU"


def test_a_slot_gets_another_column_under_a_living_tensor(backend: CudaBackend) -> None:
    import torch

    nbytes = backend.granularity
    space = ColumnSpace(backend, 3, nbytes)
    layout = ColumnLayout.of([("w", (64, 32), "bfloat16"), ("x", (128,), "float32")])
    views = space.views(layout)
    assert views["w"].device == torch.device("cuda:0") and tuple(views["w"].shape) == (3, 64, 32)
    peer = backend.create(nbytes, 0)
    scratch = ColumnSpace(backend, 1, nbytes)
    fd = backend.export(peer)
    scratch.map_column(0, peer)
    scratch.views(layout)["w"][0].fill_(7)
    torch.cuda.synchronize()
    space.map_column(2, backend.create(nbytes, 0))
    graph = torch.cuda.CUDAGraph()
    out = torch.zeros((), device="cuda")
    with torch.cuda.graph(graph):
        out.copy_(views["w"][2].float().sum())
    graph.replay()
    assert float(out) == 0
    stats = space.pull(2, backend.import_(fd, nbytes, 0))
    assert stats.complete and stats.nbytes == space.column_bytes
    graph.replay()
    assert float(out) == 7 * 64 * 32
    space.unmap_column(2)
    space.map_column(2, backend.create(nbytes, 0))
    graph.replay()
    assert float(out) == 0, "the graph reads what is mapped now"
    del views, graph
    gc.collect()
    space.close()
    scratch.close()


def test_copies_run_at_the_lowest_priority_and_let_threads_run(backend: CudaBackend) -> None:
    size = 1 << 30
    va, handles = backend.reserve(2 * size), [backend.create(size, 0) for _ in range(2)]
    for index, handle in enumerate(handles):
        backend.map(va.base + index * size, handle)
    turns, done = [0], threading.Event()

    def spin() -> None:
        while not done.is_set():
            turns[0] += 1

    spinner = threading.Thread(target=spin)
    spinner.start()
    most = 0
    for _ in range(10):
        before = turns[0]
        backend.copy(va.base, va.base + size, size)
        most = max(most, turns[0] - before)
    done.set()
    spinner.join(10)
    assert most > 100
    [lane] = backend._devices[0].idle_lanes
    with backend._lane(0):
        least, greatest = backend._driver("cuCtxGetStreamPriorityRange")
    assert least > greatest and backend._driver("cuStreamGetPriority", lane.stream) == least
    for index, handle in enumerate(handles):
        backend.unmap(va.base + index * size, size)
        backend.close(handle)
    backend.release_va(va)


def test_what_the_driver_refuses_is_a_typed_error(backend: CudaBackend) -> None:
    with pytest.raises(OutOfDeviceMemory, match=r"cuMemCreate failed: .*OUT_OF_MEMORY \(2\).*Lower the HMM's budget"):
        backend.create(1 << 42, 0)
    with pytest.raises(VmmError):
        backend.create(backend.granularity, 99)
    with pytest.raises(DriverError):
        backend.import_(os.open(os.devnull, os.O_RDONLY), backend.granularity, 0)
    host = backend.create(backend.granularity, -1)
    va = backend.reserve(backend.granularity)
    with pytest.raises(VmmError, match="host memory cannot lie"):
        backend.map(va.base, host)
    backend.close(host)
    backend.release_va(va)


def test_it_is_a_backend_of_the_registry(backend: CudaBackend) -> None:
    from elasticmoe_sglang.hmm.vmm import get_backend

    found: VmmBackend = get_backend("cuda")
    assert isinstance(found, CudaBackend) and found.granularity == backend.granularity == 2 << 20
