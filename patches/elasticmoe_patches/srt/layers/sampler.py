"""Sampling whose random numbers depend on a request's seed and position alone."""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.sampling import choose, keep_likely
from elasticmoe_patches.spec import WORKERS, Hooks

HOOKS = hook = Hooks(__name__, WORKERS)


@hook(
    "around",
    "multinomial_with_seed(logprobs, seed, positions)",
    expires="SGLang's seeded sampling runs on the CPU, and without being compiled at the first request.",
)
def around_multinomial_with_seed(original: Any, logprobs: Any, seed: Any, positions: Any) -> Any:
    """SGLang's own needs Triton, and compiles while requests wait. With deterministic inference it stays."""
    from sglang.srt.runtime_context import get_exec

    if get_exec().deterministic.enable_deterministic_inference:
        return original(logprobs, seed, positions)
    return choose(logprobs, seed, positions)


@hook(
    "around",
    "top_k_top_p_min_p_sampling_from_probs_torch(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, "
    "positions, *, return_filtered_probs=False)",
    also={
        "0.5.23": "(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, *, "
        "return_filtered_probs=False, max_top_k=None)"
    },
    expires="SGLang's min-p accepts seeds.",
)
def around_filtered_sampling(
    original: Any,
    probs: Any,
    top_ks: Any,
    top_ps: Any,
    min_ps: Any,
    need_min_p_sampling: bool,
    sampling_seed: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """SGLang asserts that nobody samples with min-p and a seed; what min-p leaves out is left out before it here."""
    if need_min_p_sampling and sampling_seed is not None:
        probs, need_min_p_sampling = keep_likely(probs, min_ps), False
    return original(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, *args, **kwargs)
