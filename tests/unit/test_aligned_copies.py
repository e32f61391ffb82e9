"""What is copied into a captured graph's buffers is aligned, so that no other form of SGLang's kernel is loaded."""

from __future__ import annotations

import pytest
import torch

from elasticmoe_patches.srt.model_executor.cuda_graph_buffer_registry import before_copy

pytestmark = pytest.mark.process


def test_sources_that_are_not_aligned_are_copied_and_the_others_are_not() -> None:
    whole = torch.arange(24)
    parts = [whole[:8], whole[3:11], whole[8:16], torch.arange(8).to(torch.int32)[1:]]
    changed = before_copy([torch.zeros_like(part) for part in parts], parts)
    assert changed is not None
    (_, made), rest = changed
    assert not rest
    assert [new is old for new, old in zip(made, parts, strict=True)] == [True, False, True, False]
    assert all(new.data_ptr() % 16 == 0 for new in made)
    assert all(torch.equal(new, old) for new, old in zip(made, parts, strict=True))


def test_aligned_sources_stay_as_they_are() -> None:
    assert before_copy([torch.zeros(8)], [torch.arange(8.0)]) is None


def test_sglang_copies_the_same_values_through_the_hook() -> None:
    from sglang.srt.model_executor.cuda_graph_buffer_registry import _grouped_foreach_copy_

    whole = torch.arange(24)
    targets = [torch.zeros(5, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)]
    changed = before_copy(targets, [whole[1:6], whole[8:15]])
    assert changed is not None
    _grouped_foreach_copy_(*changed[0])
    assert [target.tolist() for target in targets] == [list(range(1, 6)), list(range(8, 15))]
