"""The tokenizer hears the fence behind a leaver's last output (mirrors sglang/srt/managers/tokenizer_manager.py)."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import HookSpec


def after_init_request_dispatcher(_result: None, self: Any) -> None:
    from sglang.utils import TypeBasedDispatcher

    from elasticmoe_patches.services import services
    from elasticmoe_patches.srt.managers.io_struct import ElasticFenceReq, register_types

    register_types()
    self._result_dispatcher += TypeBasedDispatcher(
        [(ElasticFenceReq, lambda fence: services().output_passed(fence.seat))]
    )


HOOKS = (
    HookSpec(
        target="sglang.srt.managers.tokenizer_manager.TokenizerManager.init_request_dispatcher",
        kind="after",
        hook=f"{__name__}:after_init_request_dispatcher",
        signature="(self)",
        reason="A leaver's requests go on elsewhere only when its last tokens have arrived here.",
        expires="SGLang can move requests between ranks itself.",
        processes=frozenset(("main",)),
    ),
)
