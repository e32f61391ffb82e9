"""Which seat is asked for how much KV, when columns come and when they have gone."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.kv_pools import KvPools
from elasticmoe_sglang.errors import SeatError
from elasticmoe_sglang.hmm.protocol import DeviceUsage, ModelSpec
from elasticmoe_sglang.planner import Placement, ScalePlan, ScaleTo, initial_placement, plan_scale
from elasticmoe_sglang.seats import messages as sm
from elasticmoe_sglang.seats.membership import Membership

CHUNK = 1 << 20
COLUMN = 3 * CHUNK
DENSE = 5 * CHUNK
BUDGET = 200 * CHUNK
MODEL = ModelSpec(fingerprint="m", num_columns=16, column_bytes=COLUMN, dense_bytes=DENSE)


class World:
    """The ledger and the seats: a resize charges and refunds, and refuses what does not fit."""

    def __init__(self, members: tuple[int, ...], seats_per_device: int = 1) -> None:
        self.config = ElasticConfig(
            ep_size=len(members), max_ep_size=4, seats_per_device=seats_per_device, headroom=str(2 * CHUNK)
        )
        self.membership = Membership(seats=members, epoch=0, capacity=4)
        self.placement = initial_placement(16, members)
        self.columns = self.placed(self.placement)
        self.kv: dict[int, int] = {}
        self.asked: list[tuple[int, int]] = []
        self.broken: set[int] = set()
        self.pools = KvPools(self.config, self, self, resize_s=1.0)  # type: ignore[arg-type]
        for seat in members:
            self.boots(seat, 1)

    def boots(self, seat: int, chunks: int) -> None:
        self.kv[seat] = chunks
        state = sm.KvState(token_bytes=1024, page_tokens=1, chunk_bytes=CHUNK, cap_tokens=None, chunks=chunks)
        self.pools.learn(seat, state)

    def headroom(self, chunks: int) -> None:
        self.config = dataclasses.replace(self.config, headroom=str(chunks * CHUNK))
        self.pools._config = self.config

    async def fill(self, plan: ScalePlan | None = None) -> None:
        after = (plan.after.seats, plan.placement_after) if plan else (self.membership.seats, self.placement)
        await self.pools.fill(lambda: after)

    def placed(self, placement: Placement) -> set[tuple[int, int]]:
        """(device, column): seats of a device share a column's memory."""
        return {(self.config.device_of(owner), column) for column, owner in enumerate(placement.owners)}

    def usage(self, device: int) -> DeviceUsage:
        here = [seat for seat in self.kv if self.config.device_of(seat) == device]
        by_kind = {
            "dense": DENSE if here else 0,
            "column": COLUMN * sum(where == device for where, _ in self.columns),
            "kv": CHUNK * sum(self.kv[seat] for seat in here),
            "window": CHUNK,
        }
        used = sum(by_kind.values())
        assert used <= BUDGET, f"device {device} has {used} of {BUDGET} in use"
        return DeviceUsage(device=device, budget=BUDGET, used=used, by_kind=by_kind, peak=used)

    async def status(self) -> Any:
        devices = [self.usage(device) for device in range(self.config.num_devices)]
        return SimpleNamespace(devices=devices, model=MODEL, granularity=4096)

    async def tell_seat(self, seat: int, message: sm.ResizeKv) -> None:
        self.asked.append((seat, message.chunks))
        if seat not in self.broken:
            self.kv[seat] = message.chunks
            self.usage(self.config.device_of(seat))

    async def expect(self, kind: type, *, seat: int, operation_id: str) -> Any:
        if seat in self.broken:
            raise SeatError("it cannot let go", seat=seat)
        return SimpleNamespace(chunks=self.kv[seat])


def test_a_change_has_room_at_every_moment_and_ends_full() -> None:
    async def main(size: int, new: int, share: int) -> None:
        world = World(tuple(range(size)), share)
        await world.fill()
        plan = plan_scale(world.membership, world.placement, ScaleTo(size=new))
        before = world.pools.sizes()
        first = await world.pools.make_room(plan, seats=plan.after.seats, joining=plan.joining, leaving=plan.leaving)
        for seat in plan.joining:
            world.boots(seat, first[seat])
        world.columns |= world.placed(plan.placement_after)
        for device in range(world.config.num_devices):
            world.usage(device)
        world.columns = world.placed(plan.placement_after)
        for seat in plan.leaving:
            del world.kv[seat]
            world.pools.forget(seat)
        await world.fill(plan)
        for device in range(world.config.num_devices):
            if any(world.config.device_of(seat) == device for seat in plan.after.seats):
                assert world.usage(device).used >= 0.97 * BUDGET
        if new > size and share == 1:
            assert all(world.kv[seat] > before[seat] for seat in plan.survivors if plan.outgoing(seat))

    for share in (1, 2):
        for size in (1, 2, 3, 4):
            for new in (1, 2, 3, 4):
                if new != size:
                    asyncio.run(main(size, new, share))


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
        await world.pools.fill(lambda: None)
        assert world.asked == []

    asyncio.run(main())


def test_between_changes_seats_only_grow() -> None:
    async def main() -> None:
        world = World((0, 1))
        await world.fill()
        world.kv[0] -= 3
        world.boots(0, world.kv[0])
        world.headroom(20)  # what seat 1 has would be too much
        world.asked.clear()
        await world.pools.fill(lambda: ((0, 1), world.placement), only_grow=True)
        assert world.asked == []
        world.headroom(0)
        await world.pools.fill(lambda: ((0, 1), world.placement), only_grow=True)
        assert sorted(seat for seat, _ in world.asked) == [0, 1]

    asyncio.run(main())


def test_a_seat_that_cannot_let_go_is_an_error_and_the_others_are_known() -> None:
    async def main() -> None:
        world = World((0, 1, 2, 3))
        await world.fill()
        before = world.pools.sizes()
        world.broken = {1}
        plan = plan_scale(world.membership, world.placement, ScaleTo(size=2))
        with pytest.raises(SeatError, match="let go"):
            await world.pools.make_room(plan, seats=plan.after.seats, joining=(), leaving=plan.leaving)
        assert world.pools.sizes()[0] < before[0] and world.pools.sizes()[1] == before[1]
        world.broken = set()
        await world.fill()
        assert world.kv == before

    asyncio.run(main())


def test_a_server_whose_kv_is_its_own_is_left_alone() -> None:
    async def main() -> None:
        world = World((0, 1))
        for seat in (0, 1):
            world.pools.learn(seat, None)
        plan = plan_scale(world.membership, world.placement, ScaleTo(size=4))
        assert await world.pools.make_room(plan, seats=plan.after.seats, joining=plan.joining) == {}
        await world.fill()
        assert (world.asked, world.pools.least_bytes()) == ([], 0)

    asyncio.run(main())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_seats_of_one_device_share_it_through_any_sequence(sizes: list[int]) -> None:
    async def main() -> None:
        world = World((0,), seats_per_device=4)
        for size in sizes:
            plan = plan_scale(world.membership, world.placement, ScaleTo(size=size))
            first = await world.pools.make_room(
                plan, seats=plan.after.seats, joining=plan.joining, leaving=plan.leaving
            )
            for seat in plan.joining:
                world.boots(seat, first[seat])
            for seat in plan.leaving:
                del world.kv[seat]
                world.pools.forget(seat)
            world.membership, world.placement = plan.after, plan.placement_after
            await world.fill(plan)
            assert len({world.kv[seat] for seat in plan.after.seats}) == 1
            assert world.usage(0).used >= 0.96 * BUDGET

    asyncio.run(main())
