"""Penalties counted at once for a request that goes on elsewhere equal those counted token by token."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from elasticmoe_patches.platform import torchvision_ops
from elasticmoe_patches.srt.sampling.penaltylib.orchestrator import after_init

pytestmark = pytest.mark.process

VOCAB = 12
PENALTIES = {"frequency_penalty": 0.3, "presence_penalty": 0.5, "repetition_penalty": 1.7, "min_new_tokens": 6}


class Batch(SimpleNamespace):
    """What of a ScheduleBatch matters here; SGLang refers to it weakly."""

    __slots__ = ("__weakref__",)


def request(prompt: list[int], output: list[int], **changes: float) -> Any:
    parameters = {**PENALTIES, **changes, "stop_token_ids": {7}}
    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=3)
    return SimpleNamespace(
        origin_input_ids=prompt,
        output_ids=output,
        sampling_params=SimpleNamespace(**parameters),
        eos_token_ids={3},
        tokenizer=tokenizer,
    )


def orchestrator(reqs: list[Any], overlap: bool) -> tuple[Any, Any]:
    torchvision_ops.declare_if_unloadable()
    from sglang.srt.sampling import penaltylib as lib

    kinds = {
        lib.BatchedFrequencyPenalizer,
        lib.BatchedPresencePenalizer,
        lib.BatchedRepetitionPenalizer,
        lib.BatchedMinNewTokensPenalizer,
    }
    batch = Batch(reqs=reqs, device="cpu", enable_overlap=overlap)
    return lib.BatchedPenalizerOrchestrator(VOCAB, batch, kinds), batch


def penalised(penalties: Any) -> torch.Tensor:
    logits = torch.linspace(-3, 3, VOCAB).repeat(len(penalties.reqs()), 1)
    for kind in sorted(penalties.penalizers, key=lambda each: each.__name__):
        if kind.__name__ != "BatchedRepetitionPenalizer":  # its application is compiled by torch
            penalties.penalizers[kind].apply(logits)
        elif penalties.penalizers[kind].is_prepared():
            logits *= penalties.penalizers[kind].get_scaling_penalties()
    return logits


@pytest.mark.parametrize("overlap", [False, True])
def test_as_if_there_was_no_break(overlap: bool) -> None:
    outputs = [[4, 4, 9, 4], [2, 8, 8, 8]]
    prompts = [[1, 5], [6]]
    # Without a break: SGLang counts before each step what it knows then.
    steps, _batch = orchestrator([request(prompt, []) for prompt in prompts], overlap)
    for step in range(len(outputs[0])):
        known = step if overlap else step + 1
        last = [output[known - 1] if known else prompt[-1] for prompt, output in zip(prompts, outputs, strict=True)]
        steps.cumulate_output_tokens(torch.tensor(last))

    moved = [request(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
    resumed, batch = orchestrator([*moved, request([5], [])], overlap)
    after_init(None, resumed, VOCAB, batch, None)
    fresh, _other = orchestrator([request([5], [])], overlap)
    torch.testing.assert_close(penalised(resumed), torch.cat([penalised(steps), penalised(fresh)]))


def test_without_penalties_nothing_is_done() -> None:
    none = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
    resumed, batch = orchestrator([request([5], [1, 2], **none)], True)
    after_init(None, resumed, VOCAB, batch, None)
    assert not resumed.is_required
    torch.testing.assert_close(penalised(resumed)[0], torch.linspace(-3, 3, VOCAB))


def test_every_process_applies_penalties_in_the_same_order() -> None:
    for _ in range(8):  # the classes' addresses, and so the order of the set, may happen to be right
        penalties, batch = orchestrator([request([5], [])], False)
        shuffled = list(penalties.penalizers.items())
        random.shuffle(shuffled)
        penalties.penalizers = dict(shuffled)
        after_init(None, penalties, VOCAB, batch, None)
        names = [kind.__name__ for kind in penalties.penalizers]
        assert names == [
            "BatchedFrequencyPenalizer",
            "BatchedMinNewTokensPenalizer",
            "BatchedPresencePenalizer",
            "BatchedRepetitionPenalizer",
        ]
