"""The seeds of a batch's requests."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import WORKERS, Hooks

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "after",
    "SamplingBatchInfo.from_schedule_batch(cls, batch, vocab_size)",
    expires="SGLang heeds a request's seed without deterministic inference.",
)
def after_from_schedule_batch(sampling_info: Any, cls: type, batch: Any, vocab_size: int) -> Any:
    """SGLang reads a request's seed with deterministic inference only; its sampling on torch alone knows seeds."""
    import torch
    from sglang.srt.runtime_context import get_exec

    if sampling_info.sampling_seed is None and get_exec().kernel.sampling_backend == "pytorch":
        seeds = [req.sampling_params.sampling_seed or 0 for req in batch.reqs]
        sampling_info.sampling_seed = torch.tensor(seeds, dtype=torch.int64).to(batch.device, non_blocking=True)
    return sampling_info
