"""Which rank is asked for how much KV, when columns come and when they have gone."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.kv_balancer import KvBalancer
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.planner import Placement, ScaleTo, TransitionPlan, View, initial_placement, plan_target
from elasticmoe_sglang.wire import to_coordinator, to_worker
from elasticmoe_sglang.wire.to_hmm import DeviceUsage, ModelSpec

CHUNK = 1 << 20
COLUMN = 3 * CHUNK
DENSE = 5 * CHUNK
BUDGET = 200 * CHUNK
MODEL = ModelSpec(fingerprint="m", num_columns=16, column_bytes=COLUMN, dense_bytes=DENSE)


class World:
    """The ledger and the ranks: a resize charges and refunds, and refuses what does not fit."""

    def __init__(self, members: tuple[int, ...], ranks_per_device: int = 1, attention_tp: int = 1) -> None:
        self.config = ElasticConfig(
            ep_size=len(members),
            max_ep_size=4,
            ranks_per_device=ranks_per_device,
            attention_tp=attention_tp,
            headroom=str(2 * CHUNK),
        )
        membership = Membership(ranks=members, epoch=0, capacity=4)
        self.view = View(membership=membership, placement=initial_placement(16, members))
        self.columns = self.placed(self.view.placement)
        self.kv: dict[int, int] = {}
        self.asked: list[tuple[int, int]] = []
        self.broken: set[int] = set()
        self.balancer = KvBalancer(self.config, self, self, resize_s=1.0)  # type: ignore[arg-type]
        for rank in members:
            self.boots(rank, 1)

    def boots(self, rank: int, chunks: int) -> None:
        self.kv[rank] = chunks
        state = to_coordinator.KvState(
            token_bytes=1024, page_tokens=1, chunk_bytes=CHUNK, cap_tokens=None, chunks=chunks
        )
        self.balancer.learn(rank, state)

    def headroom(self, chunks: int) -> None:
        self.config = dataclasses.replace(self.config, headroom=str(chunks * CHUNK))
        self.balancer._config = self.config

    async def fill(self, plan: TransitionPlan | None = None) -> None:
        after = plan.after if plan else self.view
        await self.balancer.grow_kv(lambda: after)

    def placed(self, placement: Placement) -> set[tuple[int, int]]:
        """(device, column): ranks of a device share a column's memory."""
        return {(self.config.device_of(holder), column) for column, holder in placement.held()}

    def usage(self, device: int) -> DeviceUsage:
        here = [rank for rank in self.kv if self.config.device_of(rank) == device]
        by_kind = {
            "dense": DENSE if here else 0,
            "column": COLUMN * sum(where == device for where, _ in self.columns),
            "kv": CHUNK * sum(self.kv[rank] for rank in here),
            "window": CHUNK,
        }
        used = sum(by_kind.values())
        assert used <= BUDGET, f"device {device} has {used} of {BUDGET} in use"
        return DeviceUsage(device=device, budget=BUDGET, used=used, by_kind=by_kind, peak=used)

    def status(self) -> Any:
        devices = [self.usage(device) for device in range(self.config.num_devices)]
        return SimpleNamespace(devices=devices, model=MODEL, granularity=4096)

    async def ask(self, rank: int, message: to_worker.ResizeKv, reply: type) -> Any:
        self.asked.append((rank, message.chunks))
        await asyncio.sleep(0)
        if rank in self.broken:
            raise WorkerError("it cannot let go", rank=rank)
        self.kv[rank] = message.chunks
        self.usage(self.config.device_of(rank))
        return SimpleNamespace(chunks=self.kv[rank])


def test_a_change_has_room_at_every_moment_and_ends_full() -> None:
    async def main(size: int, new: int, share: int) -> None:
        world = World(tuple(range(size)), share)
        await world.fill()
        plan = plan_target(world.view, ScaleTo(size=new))
        before = world.balancer.sizes()
        first = await world.balancer.shrink_kv(plan, ranks=plan.after.ranks, joining=plan.joining)
        for rank in plan.joining:
            world.boots(rank, first[rank])
        world.columns |= world.placed(plan.after.placement)
        for device in range(world.config.num_devices):
            world.usage(device)
        world.columns = world.placed(plan.after.placement)
        for rank in plan.retiring:
            del world.kv[rank]
            world.balancer.forget(rank)
        await world.fill(plan)
        for device in range(world.config.num_devices):
            if any(world.config.device_of(rank) == device for rank in plan.after.ranks):
                assert world.usage(device).used >= 0.97 * BUDGET
        if new > size and share == 1:
            assert all(world.kv[rank] > before[rank] for rank in plan.survivors if plan.departing(rank))

    for share in (1, 2):
        for size in (1, 2, 3, 4):
            for new in (1, 2, 3, 4):
                if new != size:
                    asyncio.run(main(size, new, share))


def test_the_ranks_of_a_replica_have_what_the_fullest_device_leaves() -> None:
    async def main() -> None:
        world = World((0, 1, 2, 3), attention_tp=2)
        # Rank 1's device has least room.
        world.view = View(
            membership=world.view.membership,
            placement=Placement(owners=(*[0] * 3, *[1] * 5, *[2] * 4, *[3] * 4)),
        )
        world.columns = world.placed(world.view.placement)
        await world.fill()
        assert world.kv[0] == world.kv[1] < world.kv[2] == world.kv[3]
        # One that could not take its memory is asked again, together with its mate.
        world.asked.clear()
        world.boots(3, world.kv[3] - 1)
        await world.fill()
        assert sorted(rank for rank, _ in world.asked) == [2, 3] and world.kv[2] == world.kv[3]
        world.asked.clear()
        await world.fill()
        assert world.asked == []

    asyncio.run(main())


def test_nobody_is_asked_for_what_they_have() -> None:
    async def main() -> None:
        world = World((0, 1))
        await world.fill()
        world.asked.clear()
        await world.fill()
        assert world.asked == []

    asyncio.run(main())


def test_nothing_is_filled_while_a_change_goes_on() -> None:
    async def main() -> None:
        world = World((0, 1))
        await world.balancer.grow_kv(lambda: None)
        assert world.asked == []

    asyncio.run(main())


def test_between_changes_ranks_only_grow() -> None:
    async def main() -> None:
        world = World((0, 1))
        await world.fill()
        world.kv[0] -= 3
        world.boots(0, world.kv[0])
        world.headroom(20)  # what rank 1 has would be too much
        world.asked.clear()
        await world.balancer.grow_kv(lambda: world.view, only_grow=True)
        assert world.asked == []
        world.headroom(0)
        await world.balancer.grow_kv(lambda: world.view, only_grow=True)
        assert sorted(rank for rank, _ in world.asked) == [0, 1]

    asyncio.run(main())


def test_a_rank_that_cannot_let_go_is_an_error_and_the_others_are_known() -> None:
    async def main() -> None:
        world = World((0, 1, 2, 3))
        await world.fill()
        before = world.balancer.sizes()
        world.broken = {1}
        plan = plan_target(world.view, ScaleTo(size=2))
        with pytest.raises(WorkerError, match="let go"):
            await world.balancer.shrink_kv(plan, ranks=plan.after.ranks, joining=())
        assert world.balancer.sizes()[0] < before[0] and world.balancer.sizes()[1] == before[1]
        world.broken = set()
        await world.fill()
        assert world.kv == before

    asyncio.run(main())


def test_a_server_whose_kv_is_its_own_is_left_alone() -> None:
    async def main() -> None:
        world = World((0, 1))
        for rank in (0, 1):
            world.balancer.learn(rank, None)
        plan = plan_target(world.view, ScaleTo(size=4))
        assert await world.balancer.shrink_kv(plan, ranks=plan.after.ranks, joining=plan.joining) == {}
        await world.fill()
        assert (world.asked, world.balancer.least_bytes()) == ([], 0)

    asyncio.run(main())


@pytest.mark.process
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_ranks_of_one_device_share_it_through_any_sequence(sizes: list[int]) -> None:
    async def main() -> None:
        world = World((0,), ranks_per_device=4)
        for size in sizes:
            plan = plan_target(world.view, ScaleTo(size=size))
            first = await world.balancer.shrink_kv(plan, ranks=plan.after.ranks, joining=plan.joining)
            for rank in plan.joining:
                world.boots(rank, first[rank])
            for rank in plan.retiring:
                del world.kv[rank]
                world.balancer.forget(rank)
            world.view = plan.after
            await world.fill(plan)
            assert len({world.kv[rank] for rank in plan.after.ranks}) == 1
            assert world.usage(0).used >= 0.96 * BUDGET

    asyncio.run(main())
