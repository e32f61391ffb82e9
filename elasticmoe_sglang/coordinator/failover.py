"""Recovery from a worker's death: survivors continue without its rank, or a standby worker replaces it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.observer import Observer, Recovery
from elasticmoe_sglang.coordinator.workers import Workers
from elasticmoe_sglang.errors import ElasticMoEError, OperationInProgress, WorkerError
from elasticmoe_sglang.planner.recovery import RecoveryPlan, plan_recovery

logger = logging.getLogger(__name__)

_MEMORY_S = 20.0
_BACKOFF_S, _MOST_BACKOFF_S = 0.1, 2.0


class FailoverController:
    """Runs in the coordinator's event loop.

    Args:
        deadline_s: seconds for survivors to meet at the commit barrier, for each attempt.
        attempt_s: seconds for one attempt, the boot of replacements included. give_up_s: seconds after which no other
            attempt is made and the server ends.
        on_failure: called with a sentence when serving cannot continue.
        memory_whole: waits up to the given seconds while an HMM that ended is being replaced.
        tidy: releases memory that no rank uses, left by a change that the death interrupted.
        observer: is told of every rank that is lost, and of every recovery.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        workers: Workers,
        *,
        deadline_s: float,
        attempt_s: float,
        give_up_s: float,
        on_failure: Callable[[str], None],
        memory_whole: Callable[[float], Awaitable[None]],
        tidy: Callable[[], Awaitable[int]],
        observer: Observer | None = None,
    ) -> None:
        self._coordinator = coordinator
        self._workers = workers
        self._deadline_s = deadline_s
        self._attempt_s = attempt_s
        self._give_up_s = give_up_s
        self._on_failure = on_failure
        self._memory_whole = memory_whole
        self._tidy = tidy
        self._observer = observer or Observer()
        self._losses: dict[int, int] = {}
        self._lost_at: float | None = None  # the first loss from which there was no recovery yet
        self._planned: frozenset[int] = frozenset()  # on whose workers the attempt that runs depends
        self._overtaken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def rank_lost(self, rank: int, why: str) -> None:
        """Start recovery, or include the rank in the recovery that is running."""
        logger.error("%s; survivors continue without it", why)
        self._observer.on_rank_lost(rank)
        if self._lost_at is None:
            self._lost_at = time.monotonic()
        self._losses[rank] = self._losses.get(rank, 0) + 1
        if rank in self._planned:
            self._overtaken.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._fail_over())

    async def _fail_over(self) -> None:
        hold = OperationInProgress(
            "survivors are recovering from a worker's death", hint="Try again in a second or two"
        )
        # A change that is preparing cannot commit without the dead rank, and survivors wait until it has ended.
        lost = ", ".join(map(str, sorted(self._losses)))
        try:
            await self._coordinator.hold(hold, interrupt=f"rank {lost} was lost meanwhile")
            await self._recover_all()
            await self._tidy_up()
        except Exception as error:
            # An error of this program: nobody else would end the hold, nor tell the survivors, who wait.
            logger.exception("recovery without ranks %s failed", lost)
            self._on_failure(f"recovery without ranks {lost} failed: {type(error).__name__}: {error}")
        finally:
            self._coordinator.resume(hold)

    async def _tidy_up(self) -> None:
        try:
            await self._tidy()
        except (ElasticMoEError, OSError) as error:
            logger.error("memory that no rank uses could not be released: %s", error)

    async def _recover_all(self) -> None:
        """Recover from every loss, also those that come meanwhile, from the latest committed membership each time."""
        started = time.monotonic()
        backoff, failures, unsent = _BACKOFF_S, 0, False
        tried: dict[int, int] = {}
        dead: set[int] = set()
        while self._losses or unsent:
            losses = dict(self._losses)
            dead.update(losses)
            if losses != tried:
                tried, failures = losses, 0
            plan = plan_recovery(
                self._workers.membership(), self._coordinator.placement, losses, replace_all=failures % 2 == 1
            )
            try:
                await self._memory_whole(_MEMORY_S)
                sent = await self._attempt(plan)
            except (ElasticMoEError, OSError, asyncio.TimeoutError) as error:
                failures += 1
                logger.exception("attempt %d to recover without ranks %s failed", failures, sorted(losses))
                if self._take_commit(plan, losses):
                    unsent = True
                else:
                    await self._tidy_up()  # the columns that survivors have copied for this attempt
                if time.monotonic() - started > self._give_up_s:
                    self._on_failure(f"ranks {sorted(losses)} were lost and could not be replaced: {error}")
                    return
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, _MOST_BACKOFF_S)
                continue
            unsent = False
            self._take_commit(plan, losses)
            logger.warning(
                "ranks %s were lost; epoch %d serves with ranks %s after %.2f s (%d columns moved, %d requests sent "
                "again)",
                list(plan.dead),
                self._workers.membership().epoch,
                list(self._workers.membership().ranks),
                time.monotonic() - started,
                len(plan.moves),
                sent,
            )
            self._report(sorted(dead), sent)
            dead.clear()

    def _report(self, dead: list[int], sent: int) -> None:
        now, membership = time.monotonic(), self._workers.membership()
        lost_at, self._lost_at = self._lost_at, now if self._losses else None
        self._observer.on_recovered(
            Recovery(
                dead=dead,
                ranks=list(membership.ranks),
                epoch=membership.epoch,
                seconds=now - (now if lost_at is None else lost_at),
                requests_resent=sent,
            )
        )

    async def _attempt(self, plan: RecoveryPlan) -> int:
        """Carry a plan out, until another of its ranks is lost. Returns how many requests were sent again.

        Raises:
            WorkerError: another rank was lost, or the attempt failed for another reason.
            asyncio.TimeoutError: it did not end in time.
        """
        if not plan.dead:  # a recovery committed, and failed before the dead ranks' requests were sent again
            return await self._workers.resend_open()
        self._overtaken.clear()
        self._planned = frozenset(plan.survivors)
        attempt = asyncio.ensure_future(self._workers.recover(plan, self._deadline_s))
        overtaken = asyncio.ensure_future(self._overtaken.wait())
        try:
            await asyncio.wait({attempt, overtaken}, timeout=self._attempt_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._planned = frozenset()
            overtaken.cancel()
            if not attempt.done():
                attempt.cancel()
                await asyncio.wait({attempt})
        if not attempt.cancelled():
            return attempt.result()
        if self._overtaken.is_set():
            raise WorkerError("a survivor was lost too")
        raise asyncio.TimeoutError(f"no recovery within {self._attempt_s:g} s")

    def _take_commit(self, plan: RecoveryPlan, losses: Mapping[int, int]) -> bool:
        """Take a recovery's view over if it has committed, also one that failed afterwards. Returns whether it has.

        A rank that was lost once more since `losses` stays lost.
        """
        if plan.dead and self._workers.membership() == plan.membership:
            self._coordinator.adopt(plan.membership, plan.placement)
        elif plan.dead:
            return False
        for rank, count in losses.items():
            if self._losses.get(rank) == count:
                del self._losses[rank]
        return bool(plan.dead)
