"""Workers that are kept booted for inactive ranks: joining is mapping columns and meeting at the commit barrier then.

A hot standby serves one rank only: its addresses, windows and graphs are that rank's. It belongs to no operation; when
it dies, another one is booted. What goes wrong with one costs a change no more than a boot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.kv_balancer import KvBalancer
from elasticmoe_sglang.coordinator.worker_channel import WorkerChannel
from elasticmoe_sglang.errors import ElasticMoEError, WorkerError
from elasticmoe_sglang.planner import View
from elasticmoe_sglang.wire import to_coordinator, to_imm, to_worker

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
_BACKOFF_S, _MOST_BACKOFF_S = 2.0, 60.0


class HotStandbys:
    """Runs in the coordinator's event loop.

    Args:
        pids: rank -> pid of its worker, kept up to date by the caller.
        view: returns the committed view.
        next_incarnation: see `JoinSpec.incarnation`.
        clean_up: releases what the worker of an inactive rank has left behind.

    Attributes:
        ready: ranks whose worker waits to join.
        parking: ranks that retire, and whose worker becomes a hot standby when it is told.
    """

    def __init__(
        self,
        config: ElasticConfig,
        channel: WorkerChannel,
        kv: KvBalancer,
        *,
        pids: dict[int, int],
        view: Callable[[], View],
        next_incarnation: Callable[[], int],
        clean_up: Callable[[int], Awaitable[None]],
    ) -> None:
        self._config = config
        self._channel = channel
        self._kv = kv
        self._pids = pids
        self._view = view
        self._next_incarnation = next_incarnation
        self._clean_up = clean_up
        self._ended: set[int] = set()
        self._booting: dict[int, asyncio.Task[None]] = {}
        self.ready: set[int] = set()
        self.parking: set[int] = set()

    @property
    def booting(self) -> tuple[int, ...]:
        """Ranks for which one boots."""
        return tuple(self._booting)

    @property
    def ranks(self) -> set[int]:
        """Ranks that have one, or for which one boots."""
        return self.ready | set(self._booting)

    def exited(self, rank: int) -> None:
        """The rank's worker has ended."""
        self.parking.discard(rank)
        if rank in self.ready:
            logger.error("the hot standby of rank %d has ended", rank)
            self.ready.discard(rank)
            self._ended.add(rank)

    # -- changes ------------------------------------------------------------------------------------------------

    def choose(self, retiring: Sequence[int]) -> tuple[int, ...]:
        """Which of the retiring ranks stay as hot standbys: the lowest, which join first."""
        # Those of an attempt that was given up are still active; one that has retired may not have been told yet.
        self.parking.difference_update(self._view().ranks)
        free = max(0, self._config.hot_standbys - len(self.ranks | self.parking))
        chosen = tuple(sorted(retiring)[:free])
        self.parking.update(chosen)
        return chosen

    async def park(self, rank: int) -> bool:
        """A rank that has retired becomes a hot standby. False if its worker has ended instead.

        Raises:
            WorkerError: it could not.
        """
        try:
            request = to_worker.Park(operation_id=f"park-{rank}-{self._next_incarnation()}")
            parked = await self._channel.ask(rank, request, to_worker.Parked)
        except WorkerError:
            if rank in self._pids:
                raise
            return False
        self._kv.resized(rank, parked.kv_chunks)
        self.parking.discard(rank)
        self.ready.add(rank)
        return True

    async def join(self, join_spec: to_worker.JoinSpec) -> to_coordinator.Hello | None:
        """Have the rank's hot standby take part in a change. None: there is none, or it could not."""
        rank = join_spec.rank
        booting = self._booting.get(rank)
        if booting is not None:  # it is further than a new one would be
            await asyncio.wait([booting])
        if rank not in self.ready:
            return None
        self.ready.discard(rank)
        self._channel.forget(lambda message: getattr(message, "rank", None) == rank)
        try:
            await self._channel.tell_worker(
                rank, to_worker.Join(operation_id=join_spec.operation_id, join_spec=join_spec)
            )
            return await self._channel.wait_for(to_coordinator.Hello, rank=rank)
        except WorkerError as error:
            logger.error("the hot standby of rank %d could not join, another worker boots: %s", rank, error)
            await self._end(rank)
            return None

    async def _end(self, rank: int) -> None:
        self._channel.tell_imm(to_imm.KillWorker(rank=rank))
        if rank in self._pids:
            await self._channel.wait_for(to_coordinator.WorkerExited, rank=rank, exits=False)
        await self._clean_up(rank)

    # -- in the background --------------------------------------------------------------------------------------

    async def run(self, may_boot: Callable[[], bool]) -> None:
        """Boot hot standbys while there are too few; runs until cancelled.

        Args:
            may_boot: whether no change runs, nothing is lost, and a standby worker is ready.
        """
        backoff_s = _BACKOFF_S
        while True:
            await asyncio.sleep(_LOOK_S)
            if not may_boot():
                continue
            await self._clean_up_ended()
            rank = self._wanted()
            if rank is None:
                continue
            task = self._booting[rank] = asyncio.get_running_loop().create_task(self._boot(rank))
            try:
                await asyncio.wait_for(asyncio.shield(task), self._config.prepare_deadline_s)
                backoff_s = _BACKOFF_S
                continue
            except asyncio.TimeoutError:
                error: object = f"it did not boot within {self._config.prepare_deadline_s:g} s"
                task.cancel()
            except (ElasticMoEError, OSError) as failure:
                error = failure
            logger.error("no hot standby for rank %d; the next attempt follows in %.0f s: %s", rank, backoff_s, error)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _MOST_BACKOFF_S)

    async def _clean_up_ended(self) -> None:
        for rank in list(self._ended):
            self._ended.discard(rank)
            if rank in (*self._view().ranks, *self._pids):
                continue  # another worker serves it
            try:
                await self._clean_up(rank)
            except (ElasticMoEError, OSError) as error:
                logger.warning("memory of rank %d is released later: %s", rank, error)
                self._ended.add(rank)
                return

    def _wanted(self) -> int | None:
        """The lowest inactive rank without one, if there are too few."""
        view = self._view()
        free = [rank for rank in range(self._config.max_ep_size) if rank not in (*view.ranks, *self._pids)]
        return free[0] if free and len(self.ranks) < self._config.hot_standbys else None

    async def _boot(self, rank: int) -> None:
        try:
            view = self._view()
            chunks = self._kv.expect(rank)
            await self._kv.grow_kv(self._view)  # makes room for it
            self._channel.forget(lambda message: getattr(message, "rank", None) == rank)
            spec = to_worker.JoinSpec(
                rank=rank,
                members=view.ranks,
                epoch=view.epoch,
                joining_rank=True,
                placement=view.owners,
                copies=view.placement.copies,
                kv_chunks=chunks,
                incarnation=self._next_incarnation(),
                hot=True,
            )
            self._channel.tell_imm(to_imm.Assign(join_spec=spec))
            hello = await self._channel.wait_for(to_coordinator.Hello, rank=rank)
            logger.info("rank %d has a hot standby after %.1f s", rank, hello.boot_s)
            self.ready.add(rank)
        except BaseException:
            self._kv.forget(rank)
            await self._end(rank)
            raise
        finally:
            del self._booting[rank]
