"""Recovery from a worker's death: survivors continue without its rank, or a standby worker replaces it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.workers import Workers
from elasticmoe_sglang.errors import ElasticMoEError, OperationInProgress
from elasticmoe_sglang.planner.recovery import plan_recovery

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
# Shorter than the time that survivors wait for `Recover`.
_MEMORY_S = 20.0


class FailoverController:
    """Runs in the coordinator's event loop.

    Args:
        deadline_s: seconds for survivors to meet at the commit barrier, for each attempt.
        on_failure: called with a sentence when serving cannot continue.
        memory_whole: waits up to the given seconds while an HMM that ended is being replaced.
        tidy: releases memory that no rank uses, left by a change that the death interrupted.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        workers: Workers,
        *,
        deadline_s: float,
        on_failure: Callable[[str], None],
        memory_whole: Callable[[float], Awaitable[None]],
        tidy: Callable[[], Awaitable[int]],
    ) -> None:
        self._coordinator = coordinator
        self._workers = workers
        self._deadline_s = deadline_s
        self._on_failure = on_failure
        self._memory_whole = memory_whole
        self._tidy = tidy
        self._dead: set[int] = set()
        self._task: asyncio.Task[None] | None = None

    def rank_lost(self, rank: int, why: str) -> None:
        """Start recovery, or include the rank in the recovery that is running."""
        logger.error("%s; survivors continue without it", why)
        self._dead.add(rank)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._fail_over())

    async def _fail_over(self) -> None:
        started = time.monotonic()
        hold = OperationInProgress(
            "survivors are recovering from a worker's death", hint="Try again in a second or two"
        )
        # A change that is preparing cannot commit without the dead rank, and survivors wait until it has ended.
        lost = ", ".join(map(str, sorted(self._dead)))
        await self._coordinator.hold(hold, interrupt=f"rank {lost} was lost meanwhile")
        problem: Exception | None = None
        for attempt in range(_ATTEMPTS):
            dead = set(self._dead)
            if not dead:
                break
            plan = plan_recovery(self._workers.membership(), self._coordinator.placement, dead, replace_all=attempt > 0)
            try:
                await self._memory_whole(_MEMORY_S)
                sent = await asyncio.wait_for(self._workers.recover(plan, self._deadline_s), 4 * self._deadline_s)
            except (ElasticMoEError, OSError, asyncio.TimeoutError) as error:
                problem = error
                logger.exception("recovery attempt %d, without ranks %s, failed", attempt + 1, sorted(dead))
                continue
            self._coordinator.adopt(plan.membership, plan.placement)
            self._dead -= dead
            logger.warning(
                "ranks %s were lost; epoch %d serves with ranks %s after %.2f s (%d columns moved, %d requests sent "
                "again)",
                list(plan.dead),
                plan.membership.epoch,
                list(plan.membership.ranks),
                time.monotonic() - started,
                len(plan.moves),
                sent,
            )
        try:
            await self._tidy()
        except ElasticMoEError as error:
            logger.error("memory that no rank uses could not be released: %s", error)
        if self._dead:
            self._on_failure(f"ranks {sorted(self._dead)} were lost and could not be replaced: {problem}")
        self._coordinator.resume(hold)
