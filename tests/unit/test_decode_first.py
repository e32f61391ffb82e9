"""The first step after a commit decodes; prompts that wait are computed in the step after it."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest

from elasticmoe_patches.worker.commit import decode_first

pytestmark = pytest.mark.process


@pytest.mark.parametrize(("interval", "steps"), [(0, 1), (3, 3)])
def test_prompts_wait_for_one_step_or_as_long_as_they_had_to(interval: int, steps: int) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    scheduler: Any = object.__new__(Scheduler)
    scheduler._prefill_decode_interval_remaining = interval
    scheduler.prefill_decode_interval_min_bs = 0
    decode_first(scheduler)
    batch = () if version("sglang") == "0.5.21" else (SimpleNamespace(batch_size=lambda: 1),)
    assert [scheduler._should_defer_prefill(*batch) for _ in range(steps + 1)] == [True] * steps + [False]
