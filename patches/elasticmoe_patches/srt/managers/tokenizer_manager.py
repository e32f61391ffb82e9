"""The tokenizer keeps what it sent, hears the fence behind a retiring rank's last output, and stops the server."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from elasticmoe_patches import measure
from elasticmoe_patches.features import pin_refusal, refusal, seed_refusal
from elasticmoe_patches.journal import remember
from elasticmoe_patches.sampling import draw_seed
from elasticmoe_patches.spec import MAIN, Hooks
from elasticmoe_sglang.errors import UnsupportedFeature
from elasticmoe_sglang.runtime import only_this_user

if TYPE_CHECKING:
    from elasticmoe_patches.services import Services

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
    "after",
    "TokenizerManager.init_ipc_channels(self, port_args)",
    expires="SGLang's sockets are closed to other users.",
)
def after_init_ipc_channels(_result: None, self: Any, port_args: Any) -> None:
    """The tokenizer's sockets carry pickles: they are for this user alone."""
    for endpoint in (port_args.tokenizer_ipc_name, port_args.scheduler_input_ipc_name):
        only_this_user(endpoint)


@hook(
    "before",
    "TokenizerManager._validate_one_request(self, obj, input_ids)",
    expires="SGLang lets plugins refuse requests.",
)
def before_validate_one_request(self: Any, obj: Any, input_ids: Any) -> None:
    """Refuses what would change when a request moves or its rank dies (`features.py`).

    Raises:
        UnsupportedFeature: with the reason; HTTP 400.
    """
    from sglang.srt.runtime_context import get_exec

    from elasticmoe_patches.services import services

    pinned = getattr(obj, "routed_dp_rank", None)
    sentence = (
        refusal(obj)
        or seed_refusal(obj.sampling_params or {}, get_exec().kernel.sampling_backend)
        or (_refuse_pin(services(), pinned) if pinned is not None else None)
    )
    if sentence is not None:
        raise UnsupportedFeature(sentence)


def _refuse_pin(services: Services, pinned: int) -> str | None:
    """SGLang's data-parallel rank is an attention replica; one of several ranks is not called by one of them."""
    config, ranks = services.runtime.config, services.control.read_membership().ranks
    return pin_refusal(pinned, config.replicas_of(ranks), "ranks" if config.attention_tp == 1 else "replicas")


@hook(
    "around",
    "TokenizerManager._send_one_request(self, tokenized_obj)",
    expires="SGLang can continue a request on another rank itself.",
)
async def around_send_one_request(original: Any, self: Any, tokenized_obj: Any) -> None:
    """Keeps the tokenised request, so that it can go on elsewhere when its rank dies; one that samples has a seed."""
    draw_seed(tokenized_obj)
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
        draw_seed(tokenized_obj)
        remember(self, tokenized_obj)
        measure.arrived(self, tokenized_obj)
    await original(self, tokenized_objs)


@hook(
    "around",
    "TokenizerManager._handle_batch_output(self, recv_obj)",
    expires="SGLang tells plugins when a request's first and last token came, and its outputs name their process.",
)
async def around_handle_batch_output(original: Any, self: Any, recv_obj: Any) -> None:
    """Drops what a dead worker had sent once its requests are sent to others; counts tokens, first tokens and ends of
    requests, by which the policy decides."""
    from elasticmoe_patches.services import services

    if services().senders.admit(recv_obj):
        measure.output(recv_obj)
        await original(self, recv_obj)


@hook(
    "after",
    "TokenizerManager.collect_metrics(self, state, recv_obj, i)",
    expires="SGLang's metrics show the longest gap of a stream, and plugins can watch outputs.",
)
def after_collect_metrics(_result: None, self: Any, state: Any, recv_obj: Any, i: int) -> None:
    """Measures what streams notice of a change. SGLang calls it for each output, and only with --enable-metrics."""
    from elasticmoe_patches.observability import note_output
    from elasticmoe_patches.services import services

    note_output(services().observed, state, recv_obj.finished_reasons[i])


@hook(
    "before",
    "TokenizerManager._handle_abort_req(self, recv_obj)",
    expires="SGLang's metrics count requests that a scheduler ended.",
)
def before_handle_abort_req(self: Any, recv_obj: Any) -> None:
    """Counts requests that a scheduler ended before they ran: no output of theirs passes the hooks above."""
    from elasticmoe_patches.observability import note_output
    from elasticmoe_patches.services import services

    measure.aborted(recv_obj)
    state = self.rid_to_state.get(recv_obj.rid)
    if state is not None and recv_obj.finished_reason:
        note_output(services().observed, state, recv_obj.finished_reason)


@hook(
    "replace",
    "TokenizerManager.scale_elastic_ep(self, obj)",
    expires="SGLang lets a plugin implement its elastic EP.",
)
async def scale_elastic_ep(self: Any, obj: Any) -> Any:
    """Who calls SGLang's elastic EP in the process (NVIDIA Dynamo) reaches our coordinator; SGLang's own scales
    nothing here."""
    from sglang.srt.managers.io_struct import ScaleElasticEPReqOutput

    from elasticmoe_patches.services import services
    from elasticmoe_sglang.api.types import scale_request
    from elasticmoe_sglang.errors import ElasticMoEError

    self.auto_create_handle_loop()
    elastic = services().elastic
    try:
        answer = await elastic.scale(scale_request({"new_ep_size": obj.new_ep_size}))
    except ElasticMoEError as error:
        state = elastic.scaling_state()
        return ScaleElasticEPReqOutput(
            success=False,
            message=str(error),
            old_ep_size=state.effective_ep_size,
            new_ep_size=obj.new_ep_size,
            pending_ep_size=state.pending_ep_size,
            scale_phase=state.scale_phase,
        )
    return ScaleElasticEPReqOutput(
        success=True,
        message=answer.message,
        old_ep_size=answer.old_ep_size,
        new_ep_size=answer.new_ep_size,
        pending_ep_size=answer.pending_ep_size,
        scale_phase=answer.scale_phase,
    )


@hook(
    "replace",
    "TokenizerManager.get_elastic_ep_state(self)",
    expires="SGLang lets a plugin implement its elastic EP.",
)
def get_elastic_ep_state(self: Any) -> dict[str, Any]:
    """The same for the state of scaling: SGLang's fields, and ours for orchestrators."""
    import msgspec

    from elasticmoe_patches.services import services

    state: dict[str, Any] = msgspec.to_builtins(services().elastic.scaling_state())
    return state


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
