"""Control requests know how many ranks answer them."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.runtime_state import refuse_calls, remember_log_level
from elasticmoe_patches.spec import MAIN, Hooks
from elasticmoe_patches.srt.managers.communicator import ATTRIBUTE, Answers
from elasticmoe_sglang.runtime import current_runtime

HOOKS = hook = Hooks(__name__, MAIN)


@hook("after", "TokenizerControlMixin.init_communicators(self)", expires="SGLang counts the ranks that are active.")
def after_init_communicators(_result: None, self: Any) -> None:
    """Control requests wait for the answers of the active ranks, not of all ranks. Those that would set state of which
    ranks that join know nothing are refused (`runtime_state.py`)."""
    runtime = current_runtime()
    assert runtime is not None
    answers = Answers(len(runtime.config.replicas_of(range(runtime.config.ep_size))))
    setattr(self, ATTRIBUTE, answers)
    for name, communicator in vars(self).items():
        if name.endswith("_communicator"):
            setattr(communicator, ATTRIBUTE, answers)
    refuse_calls(self)
    remember_log_level(self)
