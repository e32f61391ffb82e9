"""The group for NPU tensors gives what gloo gives on the members alone, whatever of it goes through the host.

The device here is the CPU (tests/helpers/staged_group.py). npu_suite/check_group.py has the real torch_npu.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from elasticmoe_sglang.errors import PeerTimeout, UserInputError
from tests.helpers import collective_cases as cases
from tests.helpers import staged_group
from tests.helpers.workers import Failed, WorkerContext, WorkerPool

MEMBERSHIPS = ((0, 1, 2), (0,), (0, 2))
COUNTS = (1, 37)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    scratch = str(tmp_path_factory.mktemp("gloo"))
    pool = WorkerPool(3, scratch=scratch, window_bytes=32 << 10, timeout_s=3.0, install=staged_group.install)
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=MEMBERSHIPS, ids=lambda ranks: "".join(map(str, ranks)))
def members(request: pytest.FixtureRequest, pool: WorkerPool) -> tuple[tuple[int, ...], int]:
    return request.param, pool.next_epoch()


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_gloo(pool: WorkerPool, members: tuple[tuple[int, ...], int], name: str) -> None:
    ranks, epoch = members
    cases.check_case(pool, name, ranks, epoch, COUNTS)


def test_objects(pool: WorkerPool) -> None:
    results = pool.run((0, 2), cases.run_objects, (0, 2), pool.next_epoch())
    assert results[0]["all_gather"][1] is None and results[0]["broadcast"] == [{"rank": 2, "text": "x" * 21}, 2]


def _late(context: WorkerContext, ranks: tuple[int, ...], epoch: int) -> None:
    import torch.distributed as dist

    context.adopt(ranks, epoch)
    dist.all_reduce(torch.ones(4))


def test_a_rank_that_does_not_come_ends_in_a_typed_error(pool: WorkerPool) -> None:
    pool.submit(0, _late, (0, 1), pool.next_epoch())
    failed: Any = pool.result(0)
    assert isinstance(failed, Failed) and isinstance(failed.error, PeerTimeout)
    assert 2.5 < failed.seconds < 6


def _wrong(context: WorkerContext, ranks: tuple[int, ...], epoch: int) -> None:
    import torch.distributed as dist

    context.adopt(ranks, epoch)
    dist.all_reduce(torch.ones(4), op=dist.ReduceOp.BAND)


def test_a_lone_rank_is_refused_what_several_are(pool: WorkerPool) -> None:
    pool.submit(0, _wrong, (0,), pool.next_epoch())
    failed: Any = pool.result(0)
    assert isinstance(failed, Failed) and isinstance(failed.error, UserInputError)
