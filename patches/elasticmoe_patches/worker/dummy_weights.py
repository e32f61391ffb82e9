"""Random weights for `--load-format dummy`, in place of SGLang's `initialize_dummy_weights`.

Every dense parameter and every expert column has a generator of its own, so that the values do not depend on which
rank makes them, nor on how many ranks there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from elasticmoe_sglang.worker.weights import Attached

SEED = 1234
_RANGE = 1e-3
"""Uniform in +- this, as SGLang's own dummy weights."""


def dummy_fingerprint(config: str, dtype: torch.dtype) -> str:
    """Content fingerprint of the weights that `fill_dummy` makes for a model's config."""
    return hashlib.sha256(f"dummy {SEED} {_RANGE} {dtype} {config}".encode()).hexdigest()


def fill_dummy(
    parameters: Mapping[str, torch.nn.Parameter], columns: Mapping[str, torch.Tensor], found: Attached
) -> None:
    """Fill what no device holds yet.

    Args:
        parameters: dense ones by name.
        columns: views of the column space by name, [slots, ...]; only slots of `found.load_columns` are touched.
        found: what `WorkerWeights.attach` returned.
    """
    if found.load_dense:
        for name, param in parameters.items():
            _fill(param.data, name)
    for column in sorted(found.load_columns):
        for name, view in columns.items():
            _fill(view[column], f"{name}.{column}")


def _fill(tensor: torch.Tensor, name: str) -> None:
    if not tensor.is_floating_point() or tensor.dim() == 0:
        return  # scalars have SGLang's values
    seed = int.from_bytes(hashlib.sha256(f"{SEED} {name}".encode()).digest()[:7], "little")
    wide = tensor if tensor.itemsize > 1 else torch.empty_like(tensor, dtype=torch.float16)  # fp8 has no uniform_
    wide.uniform_(-_RANGE, _RANGE, generator=torch.Generator(tensor.device).manual_seed(seed))
    if wide is not tensor:
        tensor.copy_(wide)
