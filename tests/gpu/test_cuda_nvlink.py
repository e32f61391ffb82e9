"""One rank a GPU: the same collectives over peer-mapped windows, and columns pulled from the other GPU."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elasticmoe_kernels.triton.windows import WindowLayout
from elasticmoe_sglang.hmm.layout import ColumnLayout
from elasticmoe_sglang.hmm.space import ColumnSpace
from tests.helpers import device_cases as cases
from tests.helpers import device_graphs as graphs
from tests.helpers.device_workers import DeviceContext, DevicePool, Failed

pytestmark = pytest.mark.nvlink


@pytest.fixture(scope="module")
def pool() -> Iterator[DevicePool]:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two NVIDIA GPUs, found {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory(prefix="em") as folder:
        layout = WindowLayout(capacity=2)
        made = DevicePool(2, folder=Path(folder), backend="cuda", layout=layout, timeout_s=3.0, ranks_per_device=1)
        for rank in (0, 1):
            made.submit(rank, cases.warm_up)
        assert not any(isinstance(made.result(rank), Failed) for rank in (0, 1))
        yield made
        made.close()


@pytest.mark.parametrize("ranks", [(0,), (0, 1)], ids=str)
def test_collectives_across_gpus_compute_what_torch_does(pool: DevicePool, ranks: tuple[int, ...]) -> None:
    epoch = pool.next_epoch()
    for counts, dtype, offset, reductions in cases.GPU_CASES:
        pool.run(ranks, cases.everything, ranks, epoch, counts, (dtype,), offset, reductions)


def test_a_graph_captured_alone_serves_both_gpus(pool: DevicePool) -> None:
    for rank in (0, 1):
        pool.run([rank], graphs.capture_alone, 6 << 10)
    for ranks in ((0, 1), (0,), (0, 1)):
        epoch = pool.next_epoch()
        pool.run(ranks, graphs.replay_together, ranks, epoch, 4)


NBYTES = 64 << 20


def _offer(context: DeviceContext) -> int:
    [block] = context.client.allocate(1, "other", nbytes=NBYTES)
    [handle] = context.client.handles([block.block_id])
    space = ColumnSpace(context.client.backend, 1, NBYTES, device=1)
    space.map_column(0, handle)
    view = space.views(ColumnLayout.of([("x", (NBYTES // 8,), "int64")]))["x"]
    view[0].copy_(torch.arange(NBYTES // 8, device="cuda"))
    torch.cuda.synchronize()
    del view
    gc.collect()
    space.close()
    return block.block_id


def _fetch(context: DeviceContext, block_id: int) -> bool:
    [block] = context.client.allocate(0, "other", nbytes=NBYTES)
    [mine] = context.client.handles([block.block_id])
    [source] = context.client.handles([block_id])
    space = ColumnSpace(context.client.backend, 1, NBYTES, device=0)
    space.map_column(0, mine)
    assert space.pull(0, source).complete
    view = space.views(ColumnLayout.of([("x", (NBYTES // 8,), "int64")]))["x"]
    return bool(torch.equal(view[0], torch.arange(NBYTES // 8, device="cuda")))


def test_a_column_is_pulled_from_the_other_gpu(pool: DevicePool) -> None:
    block_id = pool.run([1], _offer)[1]
    assert pool.run([0], _fetch, block_id)[0]
