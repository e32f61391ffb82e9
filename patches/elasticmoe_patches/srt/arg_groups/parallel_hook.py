"""A prefill step of one rank is whole pages long (mirrors sglang/srt/arg_groups/parallel_hook.py).

With data-parallel attention SGLang divides the tokens of a prefill step by the number of ranks, and then asserts that
what is left is whole pages of KV: 4096 tokens are not for 3 ranks and pages of 16.
"""

from __future__ import annotations

from typing import Any

from elasticmoe_patches.spec import MAIN, Hooks

HOOKS = hook = Hooks(__name__, MAIN)


@hook(
    "after",
    "handle_data_parallelism(server_args)",
    expires="SGLang rounds the share of a rank itself.",
)
def after_handle_data_parallelism(_result: None, server_args: Any) -> None:
    """A chunk of prefill divided by the capacity need not be whole pages, which SGLang asserts.

    Round a rank's share of the chunk down to whole pages, at least one; a chunk of 0 or less means no chunks."""
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    resolved = resolving_view(server_args)
    share, page = resolved.chunked_prefill_size, resolved.page_size
    if share > 0 and share % page:
        declare_resolution(server_args, __name__, chunked_prefill_size=max(page, share - share % page))
