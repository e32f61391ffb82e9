"""Where ranks pull columns from: a device that several of them share gets each column once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.workers import Workers
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.planner import ColumnMove, Placement, View
from elasticmoe_sglang.wire import to_worker

pytestmark = pytest.mark.process

PLACEMENT = Placement(owners=(0, 1, 2, 3), copies=((3, 1),))


class Channel:
    """The agents: each answers after a while. `sources` holds what rank after rank was asked to pull."""

    def __init__(self) -> None:
        self.sources: list[tuple[int, dict[int, int]]] = []
        self.at_once = 0
        self.most_at_once = 0
        self.fails: set[int] = set()

    async def ask(self, rank: int, message: Any, kind: type) -> to_worker.Pulled:
        self.sources.append((rank, message.sources))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.01)
        self.at_once -= 1
        if rank in self.fails:
            raise WorkerError("it has exited", rank=rank)
        return kind(rank=rank, operation_id=message.operation_id, columns=len(message.sources), bytes=0, seconds=0.0)


class Control:
    """The control page and its shared memory, as far as pulling reads them."""

    def __init__(self) -> None:
        self.words: list[int] = []

    def read_view(self) -> View:
        return View(membership=Membership(ranks=(0, 1, 2, 3), epoch=1, capacity=4), placement=PLACEMENT)

    def alive(self, rank: int) -> bool:
        return True


def workers(channel: Channel) -> Workers:
    config = ElasticConfig(ep_size=4, max_ep_size=4, ranks_per_device=2, redundant_experts=4)
    nothing: Any = None
    control: Any = Control()
    line: Any = channel
    return Workers(config=config, channel=line, hmm=nothing, control=control, sglang=nothing)


def moves(rank: int, *columns: int) -> list[ColumnMove]:
    return [ColumnMove(column=column, source=PLACEMENT.owners[column], target=rank) for column in columns]


def test_what_the_device_has_or_just_got_is_mapped_there() -> None:
    channel = Channel()

    async def pull_all() -> None:
        pulling = workers(channel)
        await asyncio.gather(pulling.pull(0, "t", moves(0, 1, 2)), pulling.pull(1, "t", moves(1, 0, 2)))
        await pulling.pull(0, "t", moves(0, 3))
        await pulling.pull(0, "later", moves(0, 2))

    asyncio.run(pull_all())
    # Columns 0 and 1 are on device 0, of column 3 a copy is; column 2 is, once the first has pulled it.
    assert channel.sources == [(0, {1: 0, 2: 1}), (1, {0: 0, 2: 0}), (0, {3: 0}), (0, {2: 1})]
    assert channel.most_at_once == 1, "ranks of a device pull one after the other"


def test_devices_pull_side_by_side() -> None:
    channel = Channel()

    async def pull_all() -> None:
        pulling = workers(channel)
        await asyncio.gather(pulling.pull(0, "t", moves(0, 2)), pulling.pull(2, "t", moves(2, 0)))

    asyncio.run(pull_all())
    assert channel.most_at_once == 2


def test_what_could_not_be_pulled_is_pulled_again_from_where_it_is() -> None:
    channel = Channel()
    channel.fails = {0}

    async def pull_all() -> None:
        pulling = workers(channel)
        with pytest.raises(WorkerError, match="it has exited"):
            await pulling.pull(0, "t", moves(0, 2))
        await pulling.pull(1, "t", moves(1, 2))

    asyncio.run(pull_all())
    assert channel.sources == [(0, {2: 1}), (1, {2: 1})]
