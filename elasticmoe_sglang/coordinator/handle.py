"""The coordinator as other event loops see it: the same coroutines, run in the coordinator's own loop."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.status import Operation, Status
from elasticmoe_sglang.planner import Target

_ResultT = TypeVar("_ResultT")


class CoordinatorHandle:
    """Args:
    coordinator: lives in `loop`, which runs in another thread.
    """

    def __init__(self, coordinator: Coordinator, loop: asyncio.AbstractEventLoop) -> None:
        self._coordinator = coordinator
        self._loop = loop

    async def _run(self, coroutine: Coroutine[Any, Any, _ResultT]) -> _ResultT:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    @property
    def membership(self) -> Membership:
        return self._coordinator.membership

    @property
    def running(self) -> Operation | None:
        return self._coordinator.running

    @property
    def last(self) -> Operation | None:
        return self._coordinator.last

    async def submit(self, target: Target, operation_id: str | None = None) -> Operation:
        return await self._run(self._coordinator.submit(target, operation_id))

    async def wait(self, operation_id: str) -> Operation:
        return await self._run(self._coordinator.wait(operation_id))

    async def status(self) -> Status:
        return await self._run(self._coordinator.status())

    def get(self, operation_id: str) -> Operation | None:
        return self._coordinator.get(operation_id)

    def operations(self) -> list[Operation]:
        return self._coordinator.operations()
