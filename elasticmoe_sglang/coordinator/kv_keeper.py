"""Keeps devices full between changes: of memory that comes free at other times, KV gets its share too."""

from __future__ import annotations

import asyncio
import logging

from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.seats_port import ProcessSeats
from elasticmoe_sglang.errors import ElasticMoEError

logger = logging.getLogger(__name__)

_LOOK_S = 2.0


class KvKeeper:
    """Lives in the coordinator's event loop."""

    def __init__(self, coordinator: Coordinator, seats: ProcessSeats) -> None:
        self._coordinator = coordinator
        self._seats = seats
        self._task = asyncio.get_running_loop().create_task(self._keep())

    async def _keep(self) -> None:
        told = ""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._seats.grow_kv(lambda: self._coordinator.idle)
                told = ""
            except (ElasticMoEError, OSError) as error:
                if told != (told := str(error)):
                    logger.warning("KV could not be given all memory that is free: %s", error)
