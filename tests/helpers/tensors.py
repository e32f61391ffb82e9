"""Tensors over single pieces of memory, for tests that look into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from elasticmoe_sglang.hmm.vmm.base import VmmBackend, VmmHandle
from elasticmoe_sglang.hmm.vmm.tensors import MappedRange, tensor_in

if TYPE_CHECKING:
    import torch


def tensor_from_handle(backend: VmmBackend, handle: VmmHandle, shape: Sequence[int], dtype: str) -> torch.Tensor:
    """A contiguous tensor over the handle's memory, which is unmapped when it and all its views are gone.

    The caller closes the handle.
    """
    mapped = MappedRange(backend, handle.nbytes)
    try:
        mapped.map(0, handle)
        return tensor_in(mapped.storage(handle.device), 0, shape, dtype)
    finally:
        mapped.close()
