"""SGLang's list of attention backends for gpt-oss, on the CPU platform."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches.srt.arg_groups.model_hook import around_handle_model_specific_adjustments

pytestmark = pytest.mark.process  # imports SGLang


@pytest.mark.parametrize(
    ("architecture", "seen"),
    [("GptOssForCausalLM", ("triton", "fa3")), ("Gemma4ForCausalLM", ("torch_native", "fa3"))],
)
@pytest.mark.parametrize("fails", [False, True])
def test_torch_native_is_accepted_for_gpt_oss_alone(
    architecture: str, seen: tuple[str, str], fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.arg_groups import model_hook

    def real(_: Any) -> tuple[str, str]:
        return "torch_native", "fa3"

    found = []

    def original(_: Any) -> None:
        found.append(model_hook.attention_backends_of(None))
        if fails:
            raise AssertionError("another reason")

    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture]))
    monkeypatch.setattr(model_hook, "attention_backends_of", real)
    monkeypatch.setattr(model_hook, "model_config_of", lambda _: config)
    try:
        around_handle_model_specific_adjustments(original, None)
    except AssertionError as error:
        assert fails, error
    assert found == [seen]
    assert model_hook.attention_backends_of is real, "only while SGLang looks at this model"
