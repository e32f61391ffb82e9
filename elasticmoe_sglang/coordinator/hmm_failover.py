"""Replacing an HMM that ended while the server serves: a new one adopts the memory from the workers that map it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.memory import release_leftovers
from elasticmoe_sglang.coordinator.workers import Workers
from elasticmoe_sglang.errors import ElasticMoEError, HmmUnavailable
from elasticmoe_sglang.hmm.client import HmmClient

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
_RETRY_S = 0.5
_OFFER_S = 10.0


class HmmFailover:
    """Runs in the coordinator's event loop. Refuses changes from the HMM's end until the ledger is complete again.

    Args:
        hmm: the coordinator's client; it leases the server's shared region and offers it to the new HMM.
        restart: starts a new HMM; None: this server did not start the HMM, so somebody else has to.
        ending: whether the server is shutting down; then an HMM that ends is not replaced.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        workers: Workers,
        hmm: HmmClient,
        config: ElasticConfig,
        *,
        restart: Callable[[], None] | None,
        ending: Callable[[], bool] = lambda: False,
    ) -> None:
        self._coordinator = coordinator
        self._workers = workers
        self._hmm = hmm
        self._config = config
        self._restart = restart
        self._ending = ending
        self._instance = hmm.attached_to()
        self._whole = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def whole(self, timeout_s: float) -> None:
        """Wait until the HMM's ledger is complete. Raises HmmUnavailable after `timeout_s`."""
        self._look()
        try:
            await asyncio.wait_for(self._whole.wait(), timeout_s)
        except asyncio.TimeoutError:
            raise HmmUnavailable(f"no HMM has adopted the memory within {timeout_s:g} s") from None

    async def tidy(self) -> int:
        """Release memory that no rank uses, while no change runs. Returns the number of blocks."""
        hot = self._workers.hot.ranks
        return await asyncio.to_thread(release_leftovers, self._hmm, self._coordinator.view, self._config, hot=hot)

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
        await self._coordinator.hold_memory(absent)
        try:
            while not await self._take_over(absent):
                await asyncio.sleep(_RETRY_S)
        finally:
            self._coordinator.release_memory()
        logger.warning("the HMM's ledger is complete again after %.2f s", time.monotonic() - started)

    def _absent(self) -> HmmUnavailable:
        if self._restart is not None:
            return HmmUnavailable(
                "the HMM has ended and is being restarted", hint="Serving goes on; try again in a few seconds"
            )
        return HmmUnavailable(
            f"the HMM at {self._hmm.endpoint} has ended",
            hint="Serving goes on; start another one at the same endpoint to change the EP size again",
        )

    async def _take_over(self, absent: HmmUnavailable) -> bool:
        try:
            if self._restart is not None:
                await asyncio.to_thread(self._restart)
            instance = (await asyncio.to_thread(self._hmm.connect)).instance
            blocks = await asyncio.to_thread(self._hmm.offer)
            blocks += await asyncio.wait_for(self._workers.offer_memory(), _OFFER_S)
            leftovers = await self.tidy()
        except (ElasticMoEError, OSError, asyncio.TimeoutError) as error:
            if absent.what != (why := _why(error)):
                absent.what = why
                if self._restart is not None:
                    absent.hint = "Serving goes on, and taking over the memory is tried again"
                logger.error("the HMM's ledger is not complete: %s", why)
            return False
        logger.info("HMM %s adopted %d blocks and released %d of them that no rank uses", instance, blocks, leftovers)
        self._instance = instance
        return self._look()


def _why(error: BaseException) -> str:
    return error.what if isinstance(error, ElasticMoEError) else f"{type(error).__name__}: {error}"
