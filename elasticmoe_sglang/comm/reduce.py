"""Combining the members' values, in ascending rank order, so that every rank gets the same bits.

float16 and bfloat16 are combined in float32 and rounded once at the end. bool follows logic: SUM and MAX are "or",
PRODUCT and MIN are "and".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elasticmoe_sglang.comm.header import Reduction
from elasticmoe_sglang.errors import UserInputError

_Binary = Callable[..., Tensor]

_FOLDS: dict[Reduction, _Binary] = {
    Reduction.SUM: torch.add,
    Reduction.AVG: torch.add,
    Reduction.PRODUCT: torch.mul,
    Reduction.MIN: torch.minimum,
    Reduction.MAX: torch.maximum,
    Reduction.BAND: torch.bitwise_and,
    Reduction.BOR: torch.bitwise_or,
    Reduction.BXOR: torch.bitwise_xor,
}
_BOOL_FOLDS: dict[Reduction, _Binary] = {
    Reduction.SUM: torch.logical_or,
    Reduction.PRODUCT: torch.logical_and,
    Reduction.MIN: torch.logical_and,
    Reduction.MAX: torch.logical_or,
    Reduction.BAND: torch.bitwise_and,
    Reduction.BOR: torch.bitwise_or,
    Reduction.BXOR: torch.bitwise_xor,
}
_HALF = (torch.float16, torch.bfloat16)
_ROUNDING = (Reduction.SUM, Reduction.AVG, Reduction.PRODUCT)


def check_reduction(reduction: Reduction, dtype: torch.dtype) -> None:
    """Raises UserInputError when values of `dtype` cannot be combined so. Called before any rank waits."""
    bitwise = reduction in (Reduction.BAND, Reduction.BOR, Reduction.BXOR)
    if (
        dtype.is_complex
        or (bitwise and dtype.is_floating_point)
        or (dtype is torch.bool and reduction is Reduction.AVG)
    ):
        raise UserInputError(f"{reduction.name} of {dtype} values is not defined")


def reduce_into(out: Tensor, parts: Sequence[Tensor], reduction: Reduction) -> None:
    """out = the parts combined in their order. `out` may be one of the parts' tensors only if it is the first.

    Args:
        out: [n], any dtype of the parts.
        parts: one [n] tensor a member, ascending rank.
    """
    if len(parts) == 1:
        if out.data_ptr() != parts[0].data_ptr():
            out.copy_(parts[0])
        return
    folds = _BOOL_FOLDS if out.dtype is torch.bool else _FOLDS
    fold = folds[reduction]
    if out.dtype in _HALF and reduction in _ROUNDING:
        _reduce_half(out, parts, reduction, fold)
        return
    fold(parts[0], parts[1], out=out)
    for part in parts[2:]:
        fold(out, part, out=out)
    if reduction is Reduction.AVG:
        if out.dtype.is_floating_point:
            out.div_(len(parts))
        else:
            out.div_(len(parts), rounding_mode="trunc")


def _reduce_half(out: Tensor, parts: Sequence[Tensor], reduction: Reduction, fold: _Binary) -> None:
    if len(parts) == 2 and reduction is not Reduction.AVG:
        # One operation on two values computes in float32 and rounds once already.
        fold(parts[0], parts[1], out=out)
        return
    total = parts[0].float()
    for part in parts[1:]:
        fold(total, part, out=total)
    if reduction is Reduction.AVG:
        total.div_(len(parts))
    out.copy_(total)
