"""Control requests (flush_cache, server_info, profile, …) wait for the ranks that are there.

Mirrors sglang/srt/managers/communicator.py. SGLang waits for as many answers as it has ranks, so with an inactive rank
a request would never end. Those answer who are members when it is processed; so that their number is known when it is
sent, requests wait while a commit is on its way, and a commit waits a little for requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from elasticmoe_patches.spec import HookSpec

logger = logging.getLogger(__name__)

ATTRIBUTE = "elasticmoe_answers"
# How long a commit waits for control requests under way; one that takes longer (a flush that waits for an idle moment)
# ends with the answers of those who stay.
_DRAIN_S = 0.5
# After a rank's death: a request that only the dead rank had read is not answered any more.
_GIVE_UP_S = 5.0
_POLL_S = 0.005


class Answers:
    """How many answers to wait for. Lives in the tokenizer's event loop.

    Args:
        ranks: how many are active at the start.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._held = False
        self._locks: dict[int, asyncio.Lock] = {}
        self._under_way: dict[int, Any] = {}

    async def ask(self, original: Any, communicator: Any, request: Any) -> Any:
        """One control request, in its turn among those of its kind."""
        async with self._locks.setdefault(id(communicator), asyncio.Lock()):
            while self._held:
                await asyncio.sleep(_POLL_S)
            communicator.set_fan_out(self.ranks)
            self._under_way[id(communicator)] = communicator
            try:
                return await original(communicator, request)
            finally:
                del self._under_way[id(communicator)]

    async def hold(self) -> None:
        """Before a commit: let no more requests out, and wait for those under way."""
        self._held = True
        deadline = time.monotonic() + _DRAIN_S
        while self._under_way and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)

    def resume(self, ranks: int) -> None:
        """After a commit, made or not, or a recovery: so many ranks are active now."""
        self.ranks = ranks
        self._held = False
        for communicator in self._under_way.values():
            communicator._result_fan_out = min(communicator._result_fan_out, ranks)
            if len(communicator._result_values) >= communicator._result_fan_out:
                communicator._result_event.set()

    def give_up_later(self) -> None:
        """After a rank's death: what is still under way then has all the answers that it will get."""
        for key, communicator in self._under_way.items():
            event = communicator._result_event
            asyncio.get_running_loop().call_later(_GIVE_UP_S, self._give_up, key, event)

    def _give_up(self, key: int, event: asyncio.Event) -> None:
        communicator = self._under_way.get(key)
        if communicator is not None and communicator._result_event is event and not event.is_set():
            logger.error("a control request has %d answers after a rank's death", len(communicator._result_values))
            event.set()


def after_init_communicators(_result: None, self: Any) -> None:
    from elasticmoe_sglang.runtime import current_runtime

    runtime = current_runtime()
    assert runtime is not None
    answers = Answers(runtime.config.ep_size)
    setattr(self, ATTRIBUTE, answers)
    for name, communicator in vars(self).items():
        if name.endswith("_communicator"):
            setattr(communicator, ATTRIBUTE, answers)


async def around_queueing_call(original: Any, self: Any, obj: Any) -> Any:
    return await getattr(self, ATTRIBUTE).ask(original, self, obj)


_MAIN: frozenset[Any] = frozenset(("main",))

HOOKS = (
    HookSpec(
        target="sglang.srt.managers.tokenizer_control_mixin.TokenizerControlMixin.init_communicators",
        kind="after",
        hook=f"{__name__}:after_init_communicators",
        signature="(self)",
        reason="Control requests wait for the answers of the active ranks, not of all ranks.",
        expires="SGLang counts the ranks that are active.",
        processes=_MAIN,
    ),
    HookSpec(
        target="sglang.srt.managers.communicator.FanOutCommunicator.queueing_call",
        kind="around",
        hook=f"{__name__}:around_queueing_call",
        signature="(self, obj)",
        reason="A control request must not be on its way while the ranks that answer it change.",
        expires="SGLang counts the ranks that are active.",
        processes=_MAIN,
    ),
)
