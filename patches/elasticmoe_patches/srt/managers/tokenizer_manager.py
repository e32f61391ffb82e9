"""The tokenizer hears the fence behind a retiring rank's last output, keeps requests for the case that their rank dies,
and stops the server in good order (mirrors sglang/srt/managers/tokenizer_manager.py)."""

from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

from elasticmoe_patches.spec import HookSpec

logger = logging.getLogger(__name__)

_LOOK_S = 0.1


def after_init_request_dispatcher(_result: None, self: Any) -> None:
    from sglang.utils import TypeBasedDispatcher

    from elasticmoe_patches.services import services
    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq, register_types

    register_types()
    self._result_dispatcher += TypeBasedDispatcher(
        [(ElasticFenceReq, lambda fence: services().output_passed(fence.operation_id, fence.rank))]
    )


async def around_send_one_request(original: Any, self: Any, tokenized_obj: Any) -> None:
    """Keep what was sent: if the rank that gets it dies, another one goes on with it."""
    from elasticmoe_patches.journal import remember

    remember(self, tokenized_obj)
    await original(self, tokenized_obj)


async def around_send_batch_request(original: Any, self: Any, tokenized_objs: Any) -> None:
    from elasticmoe_patches.journal import remember

    for tokenized_obj in tokenized_objs:
        remember(self, tokenized_obj)
    await original(self, tokenized_objs)


def around_auto_create_handle_loop(original: Any, self: Any) -> None:
    """SGLang leaves SIGINT to uvicorn, which ends by KeyboardInterrupt while our coordinator still serves."""
    started = self.event_loop is not None
    original(self)
    if not started:
        self.event_loop.add_signal_handler(signal.SIGINT, stop, self)


def stop(tokenizer_manager: Any) -> None:
    """As SIGTERM does: once running requests have ended. A second time they are aborted."""
    if tokenizer_manager.gracefully_exit:
        logger.warning("SIGINT again: running requests are aborted")
        tokenizer_manager.abort_request(abort_all=True)
    else:
        logger.warning("SIGINT: the server stops when running requests have ended")
        tokenizer_manager.gracefully_exit = True


async def around_sigterm_watchdog(original: Any, self: Any) -> None:
    """SGLang looks every five seconds whether it is to stop, and as often whether requests still run. Called when both
    are so, it goes on at once to what it does then."""
    from elasticmoe_patches.services import services

    while not self.gracefully_exit:
        await asyncio.sleep(_LOOK_S)
    services().refuse_changes()
    if self.rid_to_state and not _at_once(self):
        logger.info("%d requests still run; the server stops when they have ended", len(self.rid_to_state))
    while self.rid_to_state and not _at_once(self):
        await asyncio.sleep(_LOOK_S)
    await services().begin_to_end()
    await original(self)


def around_create_abort_task(original: Any, self: Any, obj: Any) -> Any:
    """SGLang waits two seconds after every streamed response before it looks what is left of the request to abort, and
    the HTTP server waits for that before it ends. Nothing is left of a request that was answered."""
    from fastapi import BackgroundTasks

    async def abort_what_is_left() -> None:
        if any(rid in self.rid_to_state for rid in ([obj.rid] if obj.is_single else obj.rid)):
            await original(self, obj)()

    background = BackgroundTasks()
    background.add_task(abort_what_is_left)
    return background


def _at_once(tokenizer_manager: Any) -> bool:
    """SGLang's own reasons not to wait for requests."""
    from sglang.srt.managers.tokenizer_manager import ServerStatus
    from sglang.srt.utils import get_bool_env_var

    return bool(tokenizer_manager.server_status == ServerStatus.UnHealthy or get_bool_env_var("SGL_FORCE_SHUTDOWN"))


HOOKS = (
    HookSpec(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.init_request_dispatcher",
        kind="after",
        hook=f"{__name__}:after_init_request_dispatcher",
        signature="(self)",
        reason="A retiring rank's requests go on elsewhere only when its last tokens have arrived here.",
        expires="SGLang can move requests between ranks itself.",
        processes=frozenset(("main",)),
    ),
    HookSpec(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._send_one_request",
        kind="around",
        hook=f"{__name__}:around_send_one_request",
        signature="(self, tokenized_obj)",
        reason="Keeps the tokenised request, so that it can go on elsewhere when its rank dies.",
        expires="SGLang can continue a request on another rank itself.",
        processes=frozenset(("main",)),
    ),
    HookSpec(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager._send_batch_request",
        kind="around",
        hook=f"{__name__}:around_send_batch_request",
        signature="(self, tokenized_objs)",
        reason="The same for requests that are tokenised as a batch.",
        expires="SGLang can continue a request on another rank itself.",
        processes=frozenset(("main",)),
    ),
    HookSpec(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.auto_create_handle_loop",
        kind="around",
        hook=f"{__name__}:around_auto_create_handle_loop",
        signature="(self)",
        reason="SIGINT stops the server as SIGTERM does, after its running requests and with our coordinator knowing.",
        expires="SGLang's tokenizer handles SIGINT as it handles SIGTERM.",
        processes=frozenset(("main",)),
    ),
    HookSpec(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.sigterm_watchdog",
        kind="around",
        hook=f"{__name__}:around_sigterm_watchdog",
        signature="(self)",
        reason="A server that is stopped ends soon after its last request, and our coordinator knows that its "
        "processes end because of that.",
        expires="SGLang waits for the signal instead of polling every five seconds, and tells plugins.",
        processes=frozenset(("main",)),
    ),
    HookSpec(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.create_abort_task",
        kind="around",
        hook=f"{__name__}:around_create_abort_task",
        signature="(self, obj)",
        reason="A server that is stopped need not wait two seconds for requests that were answered.",
        expires="SGLang looks before it waits.",
        processes=frozenset(("main",)),
    ),
)
