"""Checkpoints that have the experts of a layer in one tensor, as gpt-oss's do: read expert by expert."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

import torch

from elasticmoe_sglang.errors import UserInputError

_STACKED = re.compile(r"\.experts\.(gate_up|down)_proj(_bias)?$")
_COLUMNS, _FILLED = "elasticmoe_columns", "elasticmoe_filled"


def is_stacked(name: str) -> bool:
    """Whether a tensor of a checkpoint has all experts of a layer."""
    return _STACKED.search(name) is not None


def limit_columns(param: torch.nn.Parameter, columns: Collection[int]) -> None:
    """Let `fill_stacked` fill these slots of the parameter only."""
    setattr(param, _COLUMNS, frozenset(columns))


def fill_stacked(param: torch.nn.Parameter, loaded: torch.Tensor, name: str, *, interleaved: bool) -> None:
    """Copy the experts that `limit_columns` names, all where it was not called; nothing else is read or written.

    Args:
        param: [experts, N, K] or, of biases, [experts, N].
        loaded: of the same shape, any strides.
        name: of the parameter.
        interleaved: rows of gate and up projection alternate in `loaded`; in the parameter all gate rows come first.

    Raises:
        UserInputError: `loaded` has another shape.
    """
    if loaded.shape != param.shape:
        raise UserInputError(
            f"the checkpoint's tensor for {name} has shape {list(loaded.shape)}, and the model {list(param.shape)}",
            hint="Give a checkpoint that fits its config.json",
        )
    columns: Iterable[int] = getattr(param, _COLUMNS, range(len(param)))
    for column in sorted(columns):
        target, source = param.data[column], loaded[column]
        if interleaved:
            half = len(target) // 2
            target[:half] = source[0::2]
            target[half:] = source[1::2]
        else:
            target.copy_(source)
    setattr(param, _FILLED, True)


def check_filled(parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
    """Of (name, parameter) pairs that `fill_stacked` was to fill, none was left out.

    Raises:
        UserInputError: the checkpoint had no tensor for one.
    """
    for name, param in parameters:
        if getattr(param, _COLUMNS, True) and not getattr(param, _FILLED, False):
            raise UserInputError(
                f"the checkpoint has no tensor of all experts for {name}",
                hint="Give a checkpoint whose experts are named as transformers names them: "
                "...mlp.experts.gate_up_proj, down_proj and their _bias",
            )
