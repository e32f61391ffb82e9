"""While no HMM has the whole memory, changes are refused with a sentence; then they are taken again."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.hmm_failover import HmmFailover
from elasticmoe_sglang.coordinator.status import Phase
from elasticmoe_sglang.errors import HmmUnavailable, ModelMismatch
from elasticmoe_sglang.planner import ScaleTo
from elasticmoe_sglang.wire.to_hmm import Block
from tests.helpers.fake_cluster import FakeCluster


class Hmm:
    """What the watch needs of the client: `instance` is the HMM that runs, None for none."""

    endpoint = "ipc:///run/hmm.sock"

    def __init__(self) -> None:
        self.instance: str | None = "first"
        self._attached: str | None = "first"
        self.refusal: Exception | None = None
        self.released: list[int] = []
        self.blocks: list[Block] = []

    def attached_to(self) -> str | None:
        return self._attached if self._attached == self.instance else None

    def connect(self) -> Any:
        if self.instance is None:
            raise HmmUnavailable("no HMM answers")
        self._attached = self.instance
        return SimpleNamespace(instance=self.instance)

    def offer(self) -> int:
        if self.refusal is not None:
            raise self.refusal
        return 1

    def lookup(self, *, kind: str) -> list[Block]:
        return [block for block in self.blocks if block.kind == kind]

    def release(self, block_ids: list[int]) -> None:
        self.released += block_ids


class Ranks:
    """Counts offers; `entered` is set while one waits for `let`."""

    def __init__(self) -> None:
        self.offers = 0
        self.hot = SimpleNamespace(ranks=())
        self.let = asyncio.Event()

    async def offer_memory(self) -> int:
        self.offers += 1
        await self.let.wait()
        return 5


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 10))


async def eventually(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def rig(restart: Any, ending: Any = lambda: False) -> tuple[Coordinator, Hmm, Ranks, HmmFailover]:
    cluster = FakeCluster(active=(0, 1))
    coordinator, hmm, ranks = cluster.coordinator(), Hmm(), Ranks()
    config = ElasticConfig(ep_size=2, max_ep_size=4)
    watch = HmmFailover(coordinator, ranks, hmm, config, restart=restart, ending=ending)  # type: ignore[arg-type]
    return coordinator, hmm, ranks, watch


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elasticmoe_sglang.coordinator.hmm_failover._LOOK_S", 0.005)
    monkeypatch.setattr("elasticmoe_sglang.coordinator.hmm_failover._RETRY_S", 0.005)


def test_own_hmm_is_started_anew_and_changes_wait_for_the_ranks() -> None:
    async def main() -> None:
        def restart() -> None:
            hmm.instance = "second"

        coordinator, hmm, ranks, watch = rig(restart)
        # Column 0 is rank 0's: its copy on device 3 and the dense block of device 2 are nobody's.
        hmm.blocks = [
            Block(block_id=1, device=0, kind="column", column=0, nbytes=1),
            Block(block_id=2, device=3, kind="column", column=0, nbytes=1),
            Block(block_id=3, device=2, kind="dense", nbytes=1),
        ]
        await watch.whole(1)
        hmm.instance = None
        await eventually(lambda: ranks.offers)
        with pytest.raises(HmmUnavailable, match=r"the HMM has ended and is being restarted\. Serving goes on"):
            await coordinator.submit(ScaleTo(size=4))
        memory = (await coordinator.status()).memory
        assert not memory.available and "is being restarted" in str(memory.error)
        with pytest.raises(HmmUnavailable, match=r"within 0\.01 s"):
            await watch.whole(0.01)
        ranks.let.set()
        await watch.whole(1)
        assert hmm.released == [2, 3] and ranks.offers == 1
        await eventually(lambda: coordinator._memory_held is None)
        operation = await coordinator.submit(ScaleTo(size=4))
        assert (await coordinator.wait(operation.operation_id)).phase is Phase.DONE

    run(main())


def test_memory_that_cannot_be_taken_over_is_said_without_a_promise() -> None:
    """On NPUs nobody can: CANN lets no other process import memory whose owner has ended."""

    async def main() -> None:
        def restart() -> None:
            hmm.instance, hmm.refusal = "second", ModelMismatch("its owner has ended")

        coordinator, hmm, ranks, watch = rig(restart)
        ranks.let.set()
        await watch.whole(1)
        hmm.instance = None
        await eventually(lambda: (held := coordinator._memory_held) and held.what == "its owner has ended")
        with pytest.raises(HmmUnavailable, match=r"its owner has ended\. Serving goes on, and .* is tried again"):
            await coordinator.submit(ScaleTo(size=4))

    run(main())


def test_another_ones_hmm_is_waited_for_and_why_it_is_not_taken_is_said() -> None:
    async def main() -> None:
        coordinator, hmm, ranks, watch = rig(None)
        ranks.let.set()
        hmm.instance = None
        await eventually(lambda: coordinator._memory_held is not None)
        with pytest.raises(HmmUnavailable, match="start another one at the same endpoint"):
            await coordinator.submit(ScaleTo(size=4))
        hmm.instance, hmm.refusal = "second", ModelMismatch("the HMM holds another model")
        await eventually(lambda: (held := coordinator._memory_held) and held.what == "the HMM holds another model")
        with pytest.raises(HmmUnavailable, match="the HMM holds another model"):
            await coordinator.submit(ScaleTo(size=4))
        assert ranks.offers == 0
        hmm.refusal = None
        await watch.whole(1)
        assert ranks.offers == 1

    run(main())


def test_a_server_that_ends_starts_no_hmm() -> None:
    async def main() -> None:
        ending, started = [False], []
        coordinator, hmm, _, watch = rig(lambda: started.append("HMM"), lambda: ending[0])
        await watch.whole(1)
        ending[0] = True
        hmm.instance = None
        await asyncio.wait_for(watch._task, 1)
        assert not started and coordinator._memory_held is None

    run(main())
