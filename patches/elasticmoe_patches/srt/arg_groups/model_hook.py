"""Models that SGLang ties to attention backends by name (mirrors sglang/srt/arg_groups/model_hook.py)."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import MAIN, Hooks

HOOKS = hook = Hooks(__name__, MAIN, scope="platform")

_SINKS_AND_WINDOWS = ("GptOssForCausalLM",)
_OURS, _ACCEPTED = "torch_native", "triton"


@hook(
    "around",
    "handle_model_specific_adjustments(server_args)",
    expires="SGLang asks the platform whether its attention has sinks and sliding windows.",
)
def around_handle_model_specific_adjustments(original: Any, server_args: Any) -> None:
    """SGLang refuses gpt-oss with its own `torch_native`, whose attention has neither sinks nor windows; the CPU
    platform's of that name has both."""
    from sglang.srt.arg_groups import model_hook

    real = model_hook.attention_backends_of

    def accepted(view: Any) -> tuple[Any, ...]:
        backends = real(view)
        if model_hook.model_config_of(server_args).hf_config.architectures[0] not in _SINKS_AND_WINDOWS:
            return tuple(backends)
        return tuple(_ACCEPTED if backend == _OURS else backend for backend in backends)

    model_hook.attention_backends_of = accepted
    try:
        original(server_args)
    finally:
        model_hook.attention_backends_of = real
