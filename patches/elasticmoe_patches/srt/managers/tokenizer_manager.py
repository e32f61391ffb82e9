"""The tokenizer hears the fence behind a retiring rank's last output (mirrors
sglang/srt/managers/tokenizer_manager.py)."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec


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
)
