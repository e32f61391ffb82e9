"""Keeps devices full between changes: of memory that comes free at other times, KV gets its share too."""

from __future__ import annotations

import asyncio
import logging

from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.workers import Workers
from elasticmoe_sglang.errors import ElasticMoEError

logger = logging.getLogger(__name__)

_LOOK_S = 2.0


class KvBalancer:
    """Lives in the coordinator's event loop."""

    def __init__(self, coordinator: Coordinator, ranks: Workers) -> None:
        self._coordinator = coordinator
        self._workers = ranks
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        told = ""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._workers.grow_idle_kv(lambda: self._coordinator.idle)
                told = ""
            except (ElasticMoEError, OSError) as error:
                if told != (told := str(error)):
                    logger.warning("KV could not be given all memory that is free: %s", error)
