"""The kernels' collectives among real processes, without a GPU: in Triton's interpreter, over windows of host memory.

The same protocol word by word (flags, windows, epochs, deadlines) through the real HMM; what it cannot show is the
device's memory model and speed (`tests/gpu`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch

from elasticmoe_kernels.triton.windows import Failure, WindowLayout
from elasticmoe_sglang.errors import CollectiveMismatch, PeerDied, PeerTimeout
from tests.helpers import device_cases as cases
from tests.helpers.device_workers import DevicePool

LAYOUT = WindowLayout(capacity=3, channels=2, data_bytes=8192, blocks=2)
TIMEOUT_S = 4.0


@pytest.fixture(scope="module")
def pool() -> Iterator[DevicePool]:
    with tempfile.TemporaryDirectory(prefix="em") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("PYTHONWARNINGS", "ignore::RuntimeWarning")
        made = DevicePool(3, folder=Path(folder), backend="cpu", layout=LAYOUT, timeout_s=TIMEOUT_S)
        yield made
        made.close()


MEMBERSHIPS = [(0, *rest) for size in range(3) for rest in combinations((1, 2), size)]


@pytest.mark.parametrize("ranks", MEMBERSHIPS, ids=str)
def test_every_membership_computes_what_torch_does(pool: DevicePool, ranks: tuple[int, ...]) -> None:
    epoch = pool.next_epoch()
    for counts, dtype, offset, reductions in (
        ((3,), torch.float32, 0, (1, 2, 4, 5)),  # not even 16 bytes
        ((1400,), torch.int64, 0, (1,)),  # several pieces and programs, the last ones not full
        ((130,), torch.bfloat16, 1, (1,)),  # beside a 16-byte boundary
        ((70,), torch.uint8, 0, ()),
    ):
        pool.run(ranks, cases.everything, ranks, epoch, counts, (dtype,), offset, reductions)


def test_steps_restart_with_the_epoch(pool: DevicePool) -> None:
    for rank in range(3):
        pool.run([rank], cases.alone, rank + 1)
    for ranks in ((0, 2), (0, 1, 2), (0, 1)):
        epoch = pool.next_epoch()
        pool.run(ranks, cases.everything, ranks, epoch, (40,), (torch.float32,), 0, (1,))
        pool.run([0], cases.alone, 1)
        # Rank 0 left and comes back in a later epoch; the others never knew.


@pytest.mark.parametrize("late", [None, 0, 1, 2])
def test_ranks_that_disagree_are_told(pool: DevicePool, late: int | None) -> None:
    """late: a rank that comes when the others gave up already."""
    epoch = pool.next_epoch()
    for rank in (0, 1, 2):
        pool.submit(rank, cases.differ, (0, 1, 2), epoch, 1.0 if rank == late else 0.0)
    errors = {rank: pool.result(rank) for rank in (0, 1, 2)}
    assert {type(error) for error in errors.values()} == {CollectiveMismatch}, errors
    assert 0 in {errors[1].rank, errors[2].rank}
    assert all("all" in str(error) and f"epoch {epoch}" in str(error) for error in errors.values())
    epoch = pool.next_epoch()
    pool.run((0, 1, 2), cases.everything, (0, 1, 2), epoch, (40,), (torch.float32,), 0, (1,))


def test_a_late_rank_ends_in_a_typed_error(pool: DevicePool) -> None:
    epoch = pool.next_epoch()
    for rank in (0, 1):
        pool.submit(rank, cases.meet_or_fail, (0, 1, 2), epoch, 40)
    pool.submit(2, cases.meet_or_fail, (0, 1, 2), epoch, 40, TIMEOUT_S + 2)
    results = {rank: pool.result(rank) for rank in (0, 1, 2)}
    for rank in (0, 1):
        seconds, error = results[rank]
        assert isinstance(error, PeerTimeout) and not isinstance(error, PeerDied), (rank, error)
        assert TIMEOUT_S - 0.5 < seconds < TIMEOUT_S + 2
    assert 2 in {results[rank][1].rank for rank in (0, 1)}
    # The late rank finds that the others gave up and does not wait for them.
    seconds, error = results[2]
    assert isinstance(error, PeerTimeout) and "gave up" in str(error) and seconds < TIMEOUT_S / 2


def test_a_killed_rank_is_named_and_its_successor_joins(pool: DevicePool) -> None:
    epoch = pool.next_epoch()
    for rank in (0, 1, 2):
        pool.submit(rank, cases.meet_or_fail, (0, 1, 2), epoch, 40, 60.0 if rank == 2 else 1.0)
    time.sleep(3.0)  # all have met; rank 2 sleeps, the others wait for it
    pool.kill(2)
    results = [pool.result(rank) for rank in (0, 1)]
    assert all(seconds < TIMEOUT_S + 2 for seconds, _ in results)
    assert any(isinstance(error, PeerDied) and error.rank == 2 for _, error in results)
    assert all(isinstance(error, PeerDied | PeerTimeout) for _, error in results)
    epoch = pool.next_epoch()
    pool.run((0, 1), cases.everything, (0, 1), epoch, (40,), (torch.float32,), 0, (1,))
    pool.start(2)
    assert pool.run([2], cases.prefetch, (0, 1)) == {2: [0, 1, 2]}
    epoch = pool.next_epoch()
    pool.run((0, 1, 2), cases.everything, (0, 1, 2), epoch, (40, 700), (torch.float32,), 0, (1,))
    usage = next(d for d in pool.status().devices if d.device == 0)
    assert usage.by_kind == {"window": 3 * LAYOUT.window_bytes}, "the killed rank's window was given back"


def test_the_host_ends_a_wait_for_a_lost_rank(pool: DevicePool) -> None:
    epoch = pool.next_epoch()
    pool.submit(0, cases.stop_while_waiting, (0, 1), epoch, 1.0)
    pool.submit(1, cases.meet_or_fail, (0, 1), epoch, 40, TIMEOUT_S + 1)  # it meets once, then stays away
    seconds, error = pool.result(0)
    assert isinstance(error, PeerTimeout) and error.rank == 1 and seconds < TIMEOUT_S / 2, (seconds, error)
    pool.result(1)
    epoch = pool.next_epoch()  # the stop was for that epoch
    pool.run((0, 1, 2), cases.everything, (0, 1, 2), epoch, (40,), (torch.float32,), 0, (1,))


def test_an_error_word_says_what_happened() -> None:
    assert Failure.unpack(0) is None
    word = 1 << 56 | 63 << 48 | 1 << 44 | 3 << 40 | 77
    assert Failure.unpack(word) == Failure(kind=1, rank=63, channel=1, operation=3, step=77)
