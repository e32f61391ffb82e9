"""The tokenizer keeps what it sent, hears the fence behind a retiring rank's last output, and stops the server."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from typing import Any

from elasticmoe_patches import measure
from elasticmoe_patches.journal import remember
from elasticmoe_patches.spec import MAIN, Hooks

HOOKS = hook = Hooks(__name__, MAIN)

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
_TOKENISED_S = 1.0
"""A request that has arrived is sent to a rank within this time."""


@hook(
    "after", "TokenizerManager.init_request_dispatcher(self)", expires="SGLang can move requests between ranks itself."
)
def after_init_request_dispatcher(_result: None, self: Any) -> None:
    """A retiring rank's requests go on elsewhere only when its last tokens have arrived here."""
    from sglang.utils import TypeBasedDispatcher

    from elasticmoe_patches.services import services
    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq, register_types

    register_types()
    self._result_dispatcher += TypeBasedDispatcher(
        [(ElasticFenceReq, lambda fence: services().output_passed(fence.operation_id, fence.rank))]
    )


@hook(
    "around",
    "TokenizerManager._send_one_request(self, tokenized_obj)",
    expires="SGLang can continue a request on another rank itself.",
)
async def around_send_one_request(original: Any, self: Any, tokenized_obj: Any) -> None:
    """Keeps the tokenised request, so that it can go on elsewhere when its rank dies; and counts it."""
    remember(self, tokenized_obj)
    measure.arrived(self, tokenized_obj)
    await original(self, tokenized_obj)


@hook(
    "around",
    "TokenizerManager._send_batch_request(self, tokenized_objs)",
    expires="SGLang can continue a request on another rank itself.",
)
async def around_send_batch_request(original: Any, self: Any, tokenized_objs: Any) -> None:
    """The same for requests that are tokenised as a batch."""
    for tokenized_obj in tokenized_objs:
        remember(self, tokenized_obj)
        measure.arrived(self, tokenized_obj)
    await original(self, tokenized_objs)


@hook(
    "before",
    "TokenizerManager._handle_batch_output(self, recv_obj)",
    expires="SGLang tells plugins when a request's first and last token came.",
)
def before_handle_batch_output(self: Any, recv_obj: Any) -> None:
    """Counts tokens, first tokens and ends of requests, by which the policy decides."""
    measure.output(recv_obj)


@hook(
    "before",
    "TokenizerManager._handle_abort_req(self, recv_obj)",
    expires="SGLang tells plugins when a request has ended.",
)
def before_handle_abort_req(self: Any, recv_obj: Any) -> None:
    """The same for requests that end without output."""
    measure.aborted(recv_obj)


@hook(
    "around",
    "TokenizerManager.auto_create_handle_loop(self)",
    expires="SGLang's tokenizer handles SIGINT as it handles SIGTERM.",
)
def around_auto_create_handle_loop(original: Any, self: Any) -> None:
    """SIGINT stops the server as SIGTERM does, after its running requests and with our coordinator knowing.

    SGLang leaves SIGINT to uvicorn, which ends by KeyboardInterrupt while our coordinator still serves.
    """
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


@hook(
    "around",
    "TokenizerManager.sigterm_watchdog(self)",
    expires="SGLang waits for the signal instead of polling every five seconds, and tells plugins.",
)
async def around_sigterm_watchdog(original: Any, self: Any) -> None:
    """A server that is stopped ends soon after its last request, and our coordinator knows that its processes end
    because of that.

    SGLang looks every five seconds whether it is to stop, and as often whether requests still run. Called when it is
    and none do, it continues at once.
    """
    from elasticmoe_patches.services import services

    while not self.gracefully_exit:
        await asyncio.sleep(_LOOK_S)
    services().refuse_changes()
    if running := _running(self):
        logger.info("%d requests still run; the server stops when they have ended", len(running))
    tokenised_by = time.monotonic() + _TOKENISED_S
    while not _at_once(self) and (_running(self) or (self.rid_to_state and time.monotonic() < tokenised_by)):
        await asyncio.sleep(_LOOK_S)
    if not _at_once(self):
        # SGLang keeps an entry for each further sample (`n`) of a request, which it never sends, and would wait for it.
        self.rid_to_state.clear()
    await services().begin_to_end()
    await original(self)


@hook("around", "TokenizerManager.create_abort_task(self, obj)", expires="SGLang looks before it waits.")
def around_create_abort_task(original: Any, self: Any, obj: Any) -> Any:
    """A server that is stopped need not wait two seconds for requests that were answered.

    SGLang waits so long after every streamed response before it looks what is left of the request to abort, and the
    HTTP server waits for that before it ends.
    """
    from fastapi import BackgroundTasks

    async def abort_what_is_left() -> None:
        if any(rid in self.rid_to_state for rid in ([obj.rid] if obj.is_single else obj.rid)):
            await original(self, obj)()

    background = BackgroundTasks()
    background.add_task(abort_what_is_left)
    return background


def _running(tokenizer_manager: Any) -> list[str]:
    """Requests that were sent to a rank and not answered in full."""
    return [rid for rid, state in tokenizer_manager.rid_to_state.items() if state.dispatched]


def _at_once(tokenizer_manager: Any) -> bool:
    """SGLang's own reasons not to wait for requests."""
    from sglang.srt.managers.tokenizer_manager import ServerStatus
    from sglang.srt.utils import get_bool_env_var

    return bool(tokenizer_manager.server_status == ServerStatus.UnHealthy or get_bool_env_var("SGL_FORCE_SHUTDOWN"))
