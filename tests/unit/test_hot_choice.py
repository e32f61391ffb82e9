"""Hot standbys in the coordinator: which retiring ranks stay, who joins, and what happens when one dies meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.hot_standbys import HotStandbys
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.planner import Placement, View
from elasticmoe_sglang.wire import to_coordinator, to_imm, to_worker
from elasticmoe_sglang.wire.to_worker import JoinSpec


class Channel:
    """The workers' side: what they answer is decided by `answers`, what they were told is in `told`."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.answers: dict[type, Callable[[], Any]] = {}
        self.pids: dict[int, int] = {}

    def forget(self, wanted: object) -> None:
        self.told.append("forget")

    def tell_imm(self, request: to_imm.Request) -> None:
        self.told.append(request)
        if isinstance(request, to_imm.Assign):
            self.pids[request.join_spec.rank] = 100 + request.join_spec.rank

    async def tell_worker(self, rank: int, request: to_worker.Request) -> None:
        self.told.append(request)

    async def ask(self, rank: int, request: Any, reply: type) -> Any:
        self.told.append(request)
        return self.answers[reply]()

    async def wait_for(self, kind: type, *, rank: int, **_: object) -> Any:
        await asyncio.sleep(0)
        if kind is to_coordinator.WorkerExited:
            self.pids.pop(rank, None)
            return None
        return self.answers[kind]()


class Kv:
    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def expect(self, rank: int) -> int:
        self.sizes[rank] = 9
        return 9

    def resized(self, rank: int, chunks: int) -> None:
        self.sizes[rank] = chunks

    def forget(self, rank: int) -> None:
        self.sizes.pop(rank, None)

    async def grow_kv(self, whose: object) -> None:
        return


class Rig:
    def __init__(self, *, hot: int, members: tuple[int, ...] = (0, 1), capacity: int = 4) -> None:
        self.channel, self.kv = Channel(), Kv()
        self.channel.pids = {rank: 10 + rank for rank in members}
        self.members = members
        self.cleaned: list[int] = []
        self.numbers = iter(range(1, 100))
        self.hot = HotStandbys(
            ElasticConfig(ep_size=len(members), max_ep_size=capacity, hot_standbys=hot),
            self.channel,  # type: ignore[arg-type]
            self.kv,  # type: ignore[arg-type]
            pids=self.channel.pids,
            view=self.view,
            next_incarnation=lambda: next(self.numbers),
            clean_up=self.clean_up,
        )

    def view(self) -> View:
        membership = Membership(ranks=self.members, epoch=3, capacity=4)
        return View(membership=membership, placement=Placement(owners=(0, 1, 0, 1)))

    async def clean_up(self, rank: int) -> None:
        self.cleaned.append(rank)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 10))


def hello(rank: int) -> to_coordinator.Hello:
    return to_coordinator.Hello(rank=rank, columns=4, checkpoint_bytes=0, pulled_bytes=0, boot_s=0.1, load_s=0.1)


def join_spec(rank: int) -> JoinSpec:
    return JoinSpec(
        rank=rank, members=(0, 1, rank), epoch=4, joining_rank=True, placement=(0, 1, rank, 1), operation_id="op"
    )


def fail() -> Any:
    raise WorkerError("it is gone", rank=2)


@pytest.mark.parametrize(
    ("wanted", "ready", "retiring", "stay"),
    [(2, (), (3, 1, 2), (1, 2)), (2, (3,), (1, 2), (1,)), (0, (), (1,), ()), (1, (2, 3), (1,), ())],
)
def test_the_lowest_retiring_ranks_stay(
    wanted: int, ready: tuple[int, ...], retiring: tuple[int, ...], stay: tuple[int, ...]
) -> None:
    async def main() -> None:
        rig = Rig(hot=wanted)
        rig.hot.ready |= set(ready)
        assert rig.hot.choose(retiring) == stay

    run(main())


def test_who_has_retired_and_was_not_told_yet_still_stays() -> None:
    """A recovery commits meanwhile, which retires nobody; and an attempt that was given up retired nobody either."""

    async def main() -> None:
        rig = Rig(hot=2, members=(0, 1, 2))
        assert rig.hot.choose((1, 2)) == (1, 2)
        assert rig.hot.choose((2,)) == (2,)  # the first attempt was given up: rank 1 is active
        rig.members = (0, 1)
        assert rig.hot.choose(()) == () and rig.hot.parking == {2}
        rig.hot.exited(2)
        assert not rig.hot.parking

    run(main())


def test_a_parked_rank_joins_again() -> None:
    async def main() -> None:
        rig = Rig(hot=1)
        rig.channel.pids[2] = 12
        rig.channel.answers = {
            to_worker.Parked: lambda: SimpleNamespace(kv_chunks=2),
            to_coordinator.Hello: lambda: hello(2),
        }
        assert await rig.hot.park(2)
        assert rig.hot.ready == {2} and rig.kv.sizes == {2: 2}
        assert await rig.hot.join(join_spec(2)) == hello(2)
        assert not rig.hot.ready
        assert isinstance(rig.channel.told[-1], to_worker.Join)

    run(main())


def test_a_rank_that_ends_while_it_is_parked_is_none() -> None:
    async def main() -> None:
        rig = Rig(hot=1)
        rig.channel.answers = {to_worker.Parked: fail}
        assert not await rig.hot.park(2)
        rig.channel.pids[2] = 12
        with pytest.raises(WorkerError):  # it lives and could not: the step is owed
            await rig.hot.park(2)

    run(main())


def test_nobody_joins_where_there_is_none() -> None:
    async def main() -> None:
        rig = Rig(hot=1)
        assert await rig.hot.join(join_spec(2)) is None
        assert rig.channel.told == []

    run(main())


def test_a_hot_standby_that_dies_while_it_joins_is_ended_and_another_worker_boots() -> None:
    async def main() -> None:
        rig = Rig(hot=1)
        rig.channel.pids[2] = 12
        rig.hot.ready.add(2)
        rig.channel.answers = {to_coordinator.Hello: fail}
        assert await rig.hot.join(join_spec(2)) is None
        assert to_imm.KillWorker(rank=2) in rig.channel.told and rig.cleaned == [2]
        assert not rig.hot.ready and 2 not in rig.channel.pids

    run(main())


def test_they_are_booted_in_the_background_lowest_first_and_a_join_waits_for_one_that_boots() -> None:
    async def main() -> None:
        rig = Rig(hot=2)
        may_end = asyncio.Event()

        async def wait_for(kind: type, *, rank: int, **_: object) -> Any:
            if kind is to_coordinator.Hello:
                await may_end.wait()
            return hello(rank)

        rig.channel.wait_for = wait_for  # type: ignore[method-assign]
        task = asyncio.ensure_future(rig.hot.run(lambda: True))
        while not any(isinstance(each, to_imm.Assign) for each in rig.channel.told):
            await asyncio.sleep(0.01)
        [rank] = rig.hot.booting
        [assigned] = [each for each in rig.channel.told if isinstance(each, to_imm.Assign)]
        spec = assigned.join_spec
        assert (rank, spec.hot, spec.kv_chunks, spec.placement) == (2, True, 9, (0, 1, 0, 1))
        joining = asyncio.ensure_future(rig.hot.join(join_spec(2)))
        await asyncio.sleep(0.05)
        assert not joining.done()
        may_end.set()
        assert await joining == hello(2)
        while 3 not in rig.hot.ready:
            await asyncio.sleep(0.01)
        task.cancel()

    run(main())


def test_one_that_dies_idle_is_cleaned_up_and_replaced() -> None:
    async def main() -> None:
        rig = Rig(hot=1)
        rig.channel.answers = {to_coordinator.Hello: lambda: hello(2)}
        rig.channel.pids[2] = 12
        rig.hot.ready.add(2)
        del rig.channel.pids[2]
        rig.hot.exited(2)
        assert not rig.hot.ready
        task = asyncio.ensure_future(rig.hot.run(lambda: True))
        while 2 not in rig.hot.ready:
            await asyncio.sleep(0.01)
        assert rig.cleaned == [2]
        task.cancel()

    run(main())


def test_nothing_is_booted_while_a_change_runs() -> None:
    async def main() -> None:
        rig = Rig(hot=2)
        task = asyncio.ensure_future(rig.hot.run(lambda: False))
        await asyncio.sleep(0.7)
        assert not rig.hot.ranks and rig.channel.told == []
        task.cancel()

    run(main())
