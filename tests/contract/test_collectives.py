"""The elastic process group gives what gloo gives on the members alone, for every collective, dtype and membership."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from elasticmoe_sglang.errors import CollectiveMismatch, RankInactive, UnsupportedFeature, UserInputError
from tests.helpers import collective_cases as cases
from tests.helpers.workers import Failed, WorkerContext, WorkerPool

MEMBERSHIPS = ((0, 1, 2, 3), (0,), (0, 2), (0, 1, 3), (0, 3), (0, 1))
# A few values; none of them a multiple of a cache line.
COUNTS = (1, 37)
# The pool's windows are 32 KiB: one and a bit, and several, with two-step reductions of slices.
WINDOW_BYTES = 32 << 10
LARGE_COUNTS = (33_000, 100_003)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    pool = WorkerPool(4, scratch=str(tmp_path_factory.mktemp("gloo")), window_bytes=WINDOW_BYTES)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPool]:
    """Windows large enough that three ranks share the work of a reduction."""
    pool = WorkerPool(4, scratch=str(tmp_path_factory.mktemp("gloo")), window_bytes=256 << 10)
    yield pool
    pool.close()


@pytest.fixture(scope="module", params=MEMBERSHIPS, ids=lambda ranks: "".join(map(str, ranks)))
def members(request: pytest.FixtureRequest, pool: WorkerPool) -> tuple[tuple[int, ...], int]:
    """(ranks, epoch): each membership is an epoch of its own, in the same processes."""
    return request.param, pool.next_epoch()


@pytest.mark.parametrize("name", cases.CASES)
def test_equals_gloo(pool: WorkerPool, members: tuple[tuple[int, ...], int], name: str) -> None:
    ranks, epoch = members
    cases.check_case(pool, name, ranks, epoch, COUNTS)


@pytest.mark.parametrize("name", ["all_reduce", "all_gather", "reduce_scatter"])
def test_messages_larger_than_a_window(pool: WorkerPool, name: str) -> None:
    ranks = (0, 1, 3)
    counts = LARGE_COUNTS if name in ("all_reduce", "all_gather") else LARGE_COUNTS[:1]
    pool.run(ranks, cases.run_case, name, ranks, pool.next_epoch(), counts)


@pytest.mark.parametrize("name", ["broadcast", "gather", "reduce"])
def test_rooted_messages_larger_than_a_window(pool: WorkerPool, name: str) -> None:
    ranks = (0, 2)
    pool.run(ranks, cases.run_case, name, ranks, pool.next_epoch(), LARGE_COUNTS[:1])


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (0, 1, 3)])
def test_reductions_shared_in_slices_equal_gloo(roomy: WorkerPool, ranks: tuple[int, ...]) -> None:
    roomy.run(ranks, cases.run_case, "all_reduce", ranks, roomy.next_epoch(), (70_001,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [5, 50_000])
def test_every_rank_gets_the_same_bits(roomy: WorkerPool, dtype: torch.dtype, count: int) -> None:
    ranks = (0, 1, 2, 3)
    bits = roomy.run(ranks, cases.run_bits, ranks, roomy.next_epoch(), dtype, count)
    assert all(bits[rank] == bits[0] for rank in ranks)


@pytest.mark.parametrize("ranks", [(0, 1, 2, 3), (0, 2), (0,)])
def test_object_collectives(pool: WorkerPool, ranks: tuple[int, ...]) -> None:
    results = pool.run(ranks, cases.run_objects, ranks, pool.next_epoch())
    objects = [{"rank": s, "text": "x" * (10 * s + 1)} if s in ranks else None for s in range(4)]
    for rank, result in results.items():
        assert result["all_gather"] == objects
        assert result["gather"] == (objects if rank == 0 else None)
        assert result["broadcast"] == [objects[ranks[-1]], ranks[-1]]


# Groups


def _groups(context: WorkerContext, ranks: tuple[int, ...], epoch: int) -> dict[str, Any]:
    import torch.distributed as dist

    context.adopt(ranks, epoch)
    used = set(context.region._free_channels)
    world = dist.group.WORLD
    alone = dist.new_group([context.rank])
    evens = dist.new_group([0, 2], backend="gloo")
    odds = dist.new_group([1, 3])
    group = evens if context.rank % 2 == 0 else odds
    other = odds if context.rank % 2 == 0 else evens
    total = torch.tensor([context.rank + 1])
    dist.all_reduce(total, group=group)
    single = torch.tensor([context.rank])
    dist.all_reduce(single, group=alone)
    result = {
        "backend": (dist.get_backend(world), dist.get_backend(evens) if group is evens else None),
        "rank": dist.get_rank(group),
        "size": dist.get_world_size(group),
        "sum": int(total),
        "alone": int(single),
        "other": other is dist.GroupMember.NON_GROUP_MEMBER,
        "ranks": dist.get_process_group_ranks(group),
    }
    for made in (alone, group):
        dist.destroy_process_group(made)
    result["channels back"] = len(used) - len(context.region._free_channels)
    return result


def test_subgroups_need_no_rendezvous_and_give_their_channel_back(pool: WorkerPool) -> None:
    # Rank 1 is absent: torch's own groups would wait for it in the store.
    results = pool.run((0, 2, 3), _groups, (0, 2, 3), pool.next_epoch())
    assert results[0]["backend"] == ("elastic", "gloo")
    assert [results[rank]["sum"] for rank in (0, 2, 3)] == [4, 4, 4]
    assert [results[rank]["alone"] for rank in (0, 2, 3)] == [0, 2, 3]
    assert all(result["other"] and result["size"] == 2 for result in results.values())
    assert (results[2]["rank"], results[2]["ranks"]) == (1, [0, 2])
    # The channel of the group that a rank is not in cannot come back by destroying it.
    assert {result["channels back"] for result in results.values()} == {1}


def _solo_boot(context: WorkerContext) -> dict[str, Any]:
    import torch.distributed as dist

    context.region.solo()
    group = context.memo["group"]
    value = torch.tensor([3.0])
    dist.all_reduce(value, group=group)
    rows = torch.full((4, 2), 9.0)
    dist.all_gather_single(rows, torch.ones(1, 2), group=group)
    kept = torch.tensor([7])
    dist.broadcast(kept, src=0, group=group)
    objects = ["mine"]
    dist.broadcast_object_list(objects, src=0, group=group)
    dist.monitored_barrier(group)
    scattered = torch.full((4,), 2.0)
    mine = torch.zeros(1)
    dist.reduce_scatter_single(mine, scattered, group=group)
    return {"value": value.item(), "rows": rows.tolist(), "kept": int(kept), "objects": objects, "mine": mine.item()}


def _sum_in(context: WorkerContext, ranks: tuple[int, ...], epoch: int) -> int:
    import torch.distributed as dist

    context.adopt(ranks, epoch)
    total = torch.tensor([context.rank + 1])
    dist.all_reduce(total, group=context.memo["group"])
    return int(total)


def test_a_joining_rank_boots_alone_while_the_others_work_and_then_takes_part(pool: WorkerPool) -> None:
    before = pool.next_epoch()
    for _ in range(3):
        pool.run((0, 1), _sum_in, (0, 1), before)
    alone = pool.run((3,), _solo_boot)[3]
    assert alone == {
        "value": 3.0,
        "rows": [[0, 0], [0, 0], [0, 0], [1, 1]],
        "kept": 7,
        "objects": ["mine"],
        "mine": 2.0,
    }
    pool.run((0, 1), _sum_in, (0, 1), before)
    after = pool.next_epoch()
    assert pool.run((0, 1, 3), _sum_in, (0, 1, 3), after) == {0: 7, 1: 7, 3: 7}
    # Retiring a rank in the middle, and a fresh process in its place.
    assert pool.run((0, 3), _sum_in, (0, 3), pool.next_epoch()) == {0: 5, 3: 5}
    pool.kill(1)
    pool.start(1)
    assert pool.run((0, 1, 3), _sum_in, (0, 1, 3), pool.next_epoch()) == {0: 7, 1: 7, 3: 7}


# Misuse


def _mismatch(context: WorkerContext, ranks: tuple[int, ...], epoch: int, what: str) -> None:
    import torch.distributed as dist

    context.adopt(ranks, epoch)
    group, odd = context.memo["group"], context.rank == ranks[-1]
    if what == "size":
        dist.all_reduce(torch.zeros(3 if odd else 4), group=group)
    elif what == "dtype":
        dist.all_reduce(torch.zeros(4, dtype=torch.int32 if odd else torch.float32), group=group)
    elif what == "operation":
        dist.barrier(group=group) if odd else dist.all_reduce(torch.zeros(4), group=group)
    elif what == "reduction":
        dist.all_reduce(torch.zeros(4), op=dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM, group=group)
    elif what == "root":
        dist.broadcast(torch.zeros(4), src=ranks[1] if odd else ranks[0], group=group)


@pytest.mark.parametrize("what", ["size", "dtype", "operation", "reduction", "root"])
def test_a_mismatch_is_raised_on_every_rank(pool: WorkerPool, what: str) -> None:
    ranks = (0, 1, 3)
    epoch = pool.next_epoch()
    results = pool.try_run(ranks, _mismatch, ranks, epoch, what)
    for result in results.values():
        assert isinstance(result, Failed) and isinstance(result.error, CollectiveMismatch), result
        assert result.error.epoch == epoch and result.error.rank in ranks
        assert result.seconds < 5, "a mismatch is found at once, not by a timeout"
    # The next membership works again.
    assert pool.run(ranks, _sum_in, ranks, pool.next_epoch()) == {0: 7, 1: 7, 3: 7}


def _absent_root(context: WorkerContext, ranks: tuple[int, ...], epoch: int, what: str) -> None:
    import torch.distributed as dist

    context.adopt(ranks, epoch)
    group = context.memo["group"]
    if what == "broadcast":
        dist.broadcast(torch.zeros(4), src=1, group=group)
    elif what == "reduce":
        dist.reduce(torch.zeros(4), dst=1, group=group)
    else:
        dist.gather(torch.zeros(4), dst=1, group=group)


@pytest.mark.parametrize("what", ["broadcast", "reduce", "gather"])
def test_an_absent_root_is_named(pool: WorkerPool, what: str) -> None:
    results = pool.try_run((0, 2), _absent_root, (0, 2), pool.epoch_of((0, 2)), what)
    for result in results.values():
        assert isinstance(result, Failed) and isinstance(result.error, RankInactive), result
        assert result.error.rank == 1


def _not_carried(context: WorkerContext, name: str) -> None:
    import torch.distributed as dist

    group, values, rows = context.memo["group"], torch.zeros(4), [torch.zeros(4) for _ in range(4)]
    calls: dict[str, Callable[[], object]] = {
        "send": lambda: dist.send(values, dst=0, group=group),
        "isend": lambda: dist.isend(values, dst=0, group=group),
        "recv": lambda: dist.recv(values, src=0, group=group),
        "recv from any": lambda: dist.recv(values, group=group),
        "batch": lambda: dist.batch_isend_irecv([dist.P2POp(dist.irecv, values, 0, group=group)]),
        "send_object_list": lambda: dist.send_object_list([1], dst=0, group=group),
        "scatter": lambda: dist.scatter(values, src=0, group=group),
        "all_to_all": lambda: dist.all_to_all(rows, rows, group=group),
        "all_to_all_single": lambda: dist.all_to_all_single(values, values.clone(), group=group),
        "reduce_scatter": lambda: dist.reduce_scatter(values, rows, group=group),
    }
    calls[name]()


def test_what_sglang_does_not_use_is_refused_with_a_sentence(pool: WorkerPool) -> None:
    pool.run((2,), WorkerContext.adopt, (0, 2), pool.next_epoch())
    names = ("send", "isend", "recv", "recv from any", "batch", "send_object_list")
    for name in (*names, "scatter", "all_to_all", "all_to_all_single", "reduce_scatter"):
        result = pool.try_run((2,), _not_carried, name)[2]
        assert isinstance(result, Failed) and isinstance(result.error, UnsupportedFeature), (name, result)
        assert "does not carry" in str(result.error) and result.seconds < 5


def _misuse(context: WorkerContext, what: str, epoch: int) -> None:
    import torch.distributed as dist

    from elasticmoe_sglang.comm.membership import Membership

    group = context.memo["group"]
    if what == "old epoch":
        context.region.set_membership(Membership(ranks=(0, 2), epoch=epoch, capacity=4))
    elif what == "not a member":
        context.region.set_membership(Membership(ranks=(0, 1), epoch=epoch + 1000, capacity=4))
    elif what == "output size":
        dist.all_gather_single(torch.zeros(7), torch.zeros(2), group=group)
    elif what == "complex":
        rows = torch.zeros(8, dtype=torch.complex64)
        group.all_gather_single(rows, rows[:2])
    elif what == "bits of floats":
        dist.all_reduce(torch.zeros(2), op=dist.ReduceOp.BAND, group=group)
    elif what == "channels":
        for _ in range(10):
            dist.new_group([0, 1, 2, 3])


@pytest.mark.parametrize("what", ["old epoch", "not a member", "output size", "complex", "bits of floats", "channels"])
def test_misuse_is_refused_with_a_sentence(tmp_path: Any, what: str) -> None:
    pool = WorkerPool(4, scratch=str(tmp_path), ranks=(2,), channels=4, window_bytes=16 << 10)
    try:
        pool.run((2,), WorkerContext.adopt, (0, 2), 1)
        result = pool.try_run((2,), _misuse, what, 1)[2]
        assert isinstance(result, Failed) and isinstance(result.error, UserInputError), result
    finally:
        pool.close()
