"""The collectives on a GPU, several ranks on one: against torch on gathered copies, in graphs, dead and late ranks.

Run under MPS (`scripts/gpu_all.sh` starts it); without it the ranks' kernels take turns and everything is slow.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch

from elasticmoe_kernels.triton.collectives import AVERAGE, MAXIMUM, SUM
from elasticmoe_kernels.triton.windows import WindowLayout
from elasticmoe_sglang.errors import CollectiveMismatch, PeerDied, PeerTimeout
from tests.helpers import device_cases as cases
from tests.helpers import device_graphs as graphs
from tests.helpers.device_workers import DevicePool

pytestmark = pytest.mark.gpu
TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def pool() -> Iterator[DevicePool]:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    with tempfile.TemporaryDirectory(prefix="em") as folder:
        made = DevicePool(4, folder=Path(folder), backend="cuda", layout=WindowLayout(capacity=4), timeout_s=TIMEOUT_S)
        # The first use of a kernel compiles it, which takes longer than the deadline: once alone.
        for ranks in ((0,), (1,), (2,), (3,)):
            made.submit(ranks[0], cases.warm_up)
        for rank in range(4):
            assert not isinstance(made.result(rank), cases.Failed)
        yield made
        made.close()


MEMBERSHIPS = [(0, *rest) for size in range(4) for rest in combinations((1, 2, 3), size)]


@pytest.mark.parametrize("ranks", MEMBERSHIPS, ids=str)
def test_every_membership_computes_what_torch_does(pool: DevicePool, ranks: tuple[int, ...]) -> None:
    epoch = pool.next_epoch()
    for counts, dtype, offset, reductions in cases.GPU_CASES:
        pool.run(ranks, cases.everything, ranks, epoch, counts, (dtype,), offset, reductions)


def test_messages_larger_than_a_window(pool: DevicePool) -> None:
    ranks, epoch = (0, 1, 3), pool.next_epoch()
    pool.run(ranks, cases.everything, ranks, epoch, (4_300_000,), (torch.bfloat16,), 0, ())
    pool.run(ranks, cases.everything, ranks, epoch, (1_200_000,), (torch.bfloat16,), 0, (SUM,))


def test_a_graph_captured_alone_serves_every_membership(pool: DevicePool) -> None:
    for rank in range(4):
        pool.run([rank], graphs.capture_alone, 6 << 10)
    for ranks in ((0, 2), (0, 1, 2, 3), (0,), (0, 3), (0, 1, 2)):
        epoch = pool.next_epoch()
        pool.run(ranks, graphs.replay_together, ranks, epoch, 4)
        pool.run(set(range(4)) - set(ranks), graphs.replay_together, None, 0, 2)


def test_torch_distributed_carries_cuda_tensors(pool: DevicePool) -> None:
    for ranks in ((0, 1, 2, 3), (0, 2), (0,)):
        epoch = pool.next_epoch()
        pool.run(ranks, graphs.through_torch_distributed, ranks, epoch)


def test_ranks_that_disagree_are_told(pool: DevicePool) -> None:
    epoch = pool.next_epoch()
    results = pool.run((0, 1, 2), cases.differ, (0, 1, 2), epoch)
    assert {type(error) for error in results.values()} == {CollectiveMismatch}


def test_a_late_rank_ends_in_a_typed_error(pool: DevicePool) -> None:
    epoch = pool.next_epoch()
    for rank in (0, 1):
        pool.submit(rank, cases.meet_or_fail, (0, 1, 2), epoch, 4096)
    pool.submit(2, cases.meet_or_fail, (0, 1, 2), epoch, 4096, TIMEOUT_S + 2)
    results = {rank: pool.result(rank) for rank in (0, 1, 2)}
    for rank in (0, 1):
        seconds, error = results[rank]
        assert isinstance(error, PeerTimeout) and TIMEOUT_S - 0.1 < seconds < TIMEOUT_S + 0.5, (seconds, error)
    seconds, error = results[2]
    assert isinstance(error, PeerTimeout) and "gave up" in str(error) and seconds < 0.5
    epoch = pool.next_epoch()
    pool.run((0, 1, 2), cases.everything, (0, 1, 2), epoch, (4096,), (torch.bfloat16,), 0, (SUM,))


def test_a_killed_rank_is_named_within_the_deadline_and_its_successor_joins(pool: DevicePool) -> None:
    epoch = pool.next_epoch()
    for rank in (0, 1, 3):
        pool.submit(rank, graphs.replay_until_it_fails, (0, 1, 3), epoch)
    time.sleep(1.0)
    pool.kill(3)
    results = {rank: pool.result(rank) for rank in (0, 1)}
    for seconds, _, replays in results.values():
        assert TIMEOUT_S - 0.1 < seconds < TIMEOUT_S + 1.0 and replays > 10
    assert any(isinstance(error, PeerDied) and error.rank == 3 for _, error, _ in results.values()), results
    assert all(isinstance(error, PeerDied | PeerTimeout) for _, error, _ in results.values())
    epoch = pool.next_epoch()
    pool.run((0, 1), graphs.replay_together, (0, 1), epoch, 3)
    pool.start(3)
    pool.run([3], cases.warm_up)
    pool.run([3], graphs.capture_alone, 6 << 10)
    epoch = pool.next_epoch()
    pool.run((0, 1, 2, 3), graphs.replay_together, (0, 1, 2, 3), epoch, 3)
    usage = next(d for d in pool.status().devices if d.device == 0)
    assert usage.by_kind["window"] == usage.used and usage.used <= 4 * (36 << 20), "the killed rank's window is back"


def test_the_host_ends_a_wait_for_a_lost_rank(pool: DevicePool) -> None:
    epoch = pool.next_epoch()
    pool.submit(0, cases.stop_while_waiting, (0, 1), epoch, 0.5)
    pool.submit(1, cases.meet_or_fail, (0, 1), epoch, 40, TIMEOUT_S + 1)
    seconds, error = pool.result(0)
    assert isinstance(error, PeerTimeout) and error.rank == 1 and seconds < 1.0, (seconds, error)
    pool.result(1)
    epoch = pool.next_epoch()
    pool.run((0, 1, 2, 3), cases.everything, (0, 1, 2, 3), epoch, (4096,), (torch.bfloat16,), 0, (SUM,))


def test_averages_and_maxima(pool: DevicePool) -> None:
    ranks, epoch = (0, 1, 2, 3), pool.next_epoch()
    pool.run(ranks, cases.everything, ranks, epoch, (2048,), (torch.float32,), 0, (AVERAGE, MAXIMUM))
