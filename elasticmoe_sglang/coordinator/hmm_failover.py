"""The HMM's process ends while the server serves: another one gets the memory back from those who have it mapped."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.memory_port import release_leftovers
from elasticmoe_sglang.coordinator.workers import Workers
from elasticmoe_sglang.errors import ElasticMoEError, HmmUnavailable
from elasticmoe_sglang.hmm.client import AsyncHmmClient

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
_RETRY_S = 0.5
_OFFER_S = 10.0


class HmmFailover:
    """Lives in the coordinator's event loop. Changes are refused from the HMM's end until the ledger is whole again.

    Args:
        hmm: has the server's shared region, and offers it like every rank offers what it maps.
        restart: starts the HMM anew if it is this server's own; None: whoever started it has to.
        ending: the server is shutting down, so an HMM that ends is not to be replaced.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        ranks: Workers,
        hmm: AsyncHmmClient,
        config: ElasticConfig,
        *,
        restart: Callable[[], None] | None,
        ending: Callable[[], bool] = lambda: False,
    ) -> None:
        self._coordinator = coordinator
        self._workers = ranks
        self._hmm = hmm
        self._config = config
        self._restart = restart
        self._ending = ending
        self._instance = hmm.attached_to()
        self._whole = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def whole(self, timeout_s: float) -> None:
        """Until the HMM has everything. Raises HmmUnavailable."""
        self._look()
        try:
            await asyncio.wait_for(self._whole.wait(), timeout_s)
        except asyncio.TimeoutError:
            raise HmmUnavailable(f"no HMM has taken the memory over within {timeout_s:g} s") from None

    async def tidy(self) -> int:
        """Gives memory back that no rank uses; while no change runs. Returns how many blocks."""
        placement, ranks = self._coordinator.placement, self._coordinator.membership.ranks
        return await release_leftovers(self._hmm, placement, ranks, self._config)

    def _look(self) -> bool:
        if self._hmm.attached_to() == self._instance:
            self._whole.set()
        else:
            self._whole.clear()
        return self._whole.is_set()

    async def _watch(self) -> None:
        while not self._ending():
            if not self._look():
                await self._replace()
            await asyncio.sleep(_LOOK_S)

    async def _replace(self) -> None:
        started = time.monotonic()
        absent = self._absent()
        logger.error("%s", absent)
        await self._coordinator.hold(absent)
        try:
            while not await self._take_over(absent):
                await asyncio.sleep(_RETRY_S)
        finally:
            self._coordinator.resume(absent)
        logger.warning("the HMM's memory is whole again after %.2f s", time.monotonic() - started)

    def _absent(self) -> HmmUnavailable:
        if self._restart is not None:
            return HmmUnavailable(
                "the HMM has ended and is being started anew", hint="Serving goes on; ask again in a few seconds"
            )
        return HmmUnavailable(
            f"the HMM at {self._hmm.endpoint} has ended",
            hint="Serving goes on; start another one at the same endpoint to change the EP size again",
        )

    async def _take_over(self, absent: HmmUnavailable) -> bool:
        try:
            if self._restart is not None:
                await asyncio.get_running_loop().run_in_executor(None, self._restart)
            instance = (await self._hmm.connect()).instance
            blocks = await self._hmm.offer() + await asyncio.wait_for(self._workers.offer_memory(), _OFFER_S)
            leftovers = await self.tidy()
        except (ElasticMoEError, OSError, asyncio.TimeoutError) as error:
            if absent.what != (why := _why(error)):
                absent.what = why
                logger.error("the HMM's memory is not whole: %s", why)
            return False
        logger.info("HMM %s took over %d blocks, of which %d were not needed", instance, blocks, leftovers)
        self._instance = instance
        return self._look()


def _why(error: BaseException) -> str:
    return error.what if isinstance(error, ElasticMoEError) else f"{type(error).__name__}: {error}"
