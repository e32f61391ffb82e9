"""Control requests (flush_cache, server_info, profile, …) wait for the active ranks.

SGLang waits for as many answers as it has ranks, so with an inactive rank a request would never end. The ranks that are
active when a request is processed answer it; so that their number is known when it is sent, requests wait while a
commit is in progress, and a commit waits a little for requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from elasticmoe_patches.spec import MAIN, Hooks

logger = logging.getLogger(__name__)

HOOKS = hook = Hooks(__name__, MAIN)

ATTRIBUTE = "elasticmoe_answers"
# How long a commit waits for control requests in flight; one that takes longer (a flush that waits for an idle moment)
# completes with the answers of the ranks that stay.
_DRAIN_S = 0.5
# After a rank's death: a request that only the dead rank had read is never answered.
_GIVE_UP_S = 5.0
_POLL_S = 0.005


class Answers:
    """How many answers to wait for. Used in the tokenizer's event loop only.

    Args:
        ranks: how many are active at the start.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._held = False
        self._locks: dict[int, asyncio.Lock] = {}
        self._in_flight: dict[int, Any] = {}

    async def ask(self, original: Any, communicator: Any, request: Any) -> Any:
        """Send one control request, after those of its kind that were sent before it."""
        async with self._locks.setdefault(id(communicator), asyncio.Lock()):
            while self._held:
                await asyncio.sleep(_POLL_S)
            communicator.set_fan_out(self.ranks)
            self._in_flight[id(communicator)] = communicator
            try:
                return await original(communicator, request)
            finally:
                del self._in_flight[id(communicator)]

    async def hold(self) -> None:
        """Before a commit: send no more requests, and wait for those in flight."""
        self._held = True
        deadline = time.monotonic() + _DRAIN_S
        while self._in_flight and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)

    def resume(self, ranks: int) -> None:
        """After a commit, made or aborted, or a recovery: so many ranks are active now."""
        self.ranks = ranks
        self._held = False
        for communicator in self._in_flight.values():
            communicator._result_fan_out = min(communicator._result_fan_out, ranks)
            if len(communicator._result_values) >= communicator._result_fan_out:
                communicator._result_event.set()

    def give_up_later(self) -> None:
        """After a rank's death: requests that are still in flight then have all the answers that they will get."""
        for key, communicator in self._in_flight.items():
            event = communicator._result_event
            asyncio.get_running_loop().call_later(_GIVE_UP_S, self._give_up, key, event)

    def _give_up(self, key: int, event: asyncio.Event) -> None:
        communicator = self._in_flight.get(key)
        if communicator is not None and communicator._result_event is event and not event.is_set():
            logger.error("a control request has %d answers after a rank's death", len(communicator._result_values))
            event.set()


@hook("around", "FanOutCommunicator.queueing_call(self, obj)", expires="SGLang counts the ranks that are active.")
async def around_queueing_call(original: Any, self: Any, obj: Any) -> Any:
    """A control request must not be on its way while the ranks that answer it change."""
    return await getattr(self, ATTRIBUTE).ask(original, self, obj)
