"""A seat's process dies while it serves: the others go on without it, or with a standby in its place."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.recovery import plan_recovery
from elasticmoe_sglang.coordinator.seats_port import ProcessSeats
from elasticmoe_sglang.errors import ElasticMoEError, OperationInProgress

logger = logging.getLogger(__name__)

_ATTEMPTS = 5
# Survivors wait longer than this to be told how to go on.
_MEMORY_S = 20.0


class Healer:
    """Lives in the coordinator's event loop.

    Args:
        deadline_s: for the survivors to meet at the gate, each attempt.
        on_failure: serving cannot go on; gets a sentence.
        memory_whole: waits, that many seconds at most, while an HMM that died is being replaced.
        tidy: gives memory back that no seat uses: of a change that the death kept from its end.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        seats: ProcessSeats,
        *,
        deadline_s: float,
        on_failure: Callable[[str], None],
        memory_whole: Callable[[float], Awaitable[None]],
        tidy: Callable[[], Awaitable[int]],
    ) -> None:
        self._coordinator = coordinator
        self._seats = seats
        self._deadline_s = deadline_s
        self._on_failure = on_failure
        self._memory_whole = memory_whole
        self._tidy = tidy
        self._dead: set[int] = set()
        self._task: asyncio.Task[None] | None = None

    def seat_lost(self, seat: int, why: str) -> None:
        """An occupied seat's process has ended, and was not to."""
        logger.error("%s; the others go on", why)
        self._dead.add(seat)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._heal())

    async def _heal(self) -> None:
        started = time.monotonic()
        hold = OperationInProgress(
            "a seat has died and the others are taking over", hint="Ask again in a second or two"
        )
        # A change that is preparing cannot be committed without the dead seat, and survivors wait for the end of it.
        lost = ", ".join(map(str, sorted(self._dead)))
        await self._coordinator.hold(hold, interrupt=f"seat {lost} was lost meanwhile")
        problem: Exception | None = None
        for attempt in range(_ATTEMPTS):
            dead = set(self._dead)
            if not dead:
                break
            plan = plan_recovery(self._seats.membership(), self._coordinator.placement, dead, replace_all=attempt > 0)
            try:
                await self._memory_whole(_MEMORY_S)
                sent = await asyncio.wait_for(self._seats.recover(plan, self._deadline_s), 4 * self._deadline_s)
            except (ElasticMoEError, OSError, asyncio.TimeoutError) as error:
                problem = error
                logger.exception("attempt %d to go on without seats %s failed", attempt + 1, sorted(dead))
                continue
            self._coordinator.adopt(plan.membership, plan.placement)
            self._dead -= dead
            logger.warning(
                "seats %s were lost; epoch %d serves with seats %s after %.2f s (%d columns taken over, %d requests "
                "sent again)",
                list(plan.dead),
                plan.membership.epoch,
                list(plan.membership.seats),
                time.monotonic() - started,
                len(plan.moves),
                sent,
            )
        try:
            await self._tidy()
        except ElasticMoEError as error:
            logger.error("memory that no seat uses could not be given back: %s", error)
        if self._dead:
            self._on_failure(f"seats {sorted(self._dead)} were lost and could not be replaced: {problem}")
        self._coordinator.resume(hold)
