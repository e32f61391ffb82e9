"""The tokenizer keeps what it sent, and hears the fence behind a retiring rank's last output."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.journal import remember
from elasticmoe_patches.spec import MAIN, Hooks

HOOKS = hook = Hooks(__name__, MAIN)


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
    """Keeps the tokenised request, so that it can go on elsewhere when its rank dies."""
    remember(self, tokenized_obj)
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
    await original(self, tokenized_objs)
