"""Copying a batch into the buffers that a captured graph reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from elasticmoe_patches.spec import WORKERS, Hooks

if TYPE_CHECKING:
    import torch

HOOKS = hook = Hooks(__name__, WORKERS)

_ALIGNED = 16
"""Bytes: what Triton compiles a pointer for."""


@hook(
    "before",
    "_grouped_foreach_copy_(dsts, srcs)",
    expires="SGLang's small-copy kernel is one for all alignments (do_not_specialize_on_alignment of sources).",
)
def before_copy(
    dsts: Sequence[torch.Tensor], srcs: Sequence[torch.Tensor]
) -> tuple[tuple[Any, Any], dict[str, Any]] | None:
    """SGLang's kernel is compiled and loaded anew for each set of sources that are not aligned, such as a part of the
    free KV slots: while the server serves, and other ranks' kernels wait on the same GPU meanwhile.

    Sources that are not aligned are copied first, which launches no kernel.
    """
    if all(src.data_ptr() % _ALIGNED == 0 for src in srcs):
        return None
    return (dsts, [src if src.data_ptr() % _ALIGNED == 0 else src.clone() for src in srcs]), {}
