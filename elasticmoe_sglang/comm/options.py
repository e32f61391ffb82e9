"""What torch's options objects ask of a collective."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from elasticmoe_sglang.comm.header import Reduction
from elasticmoe_sglang.comm.reduce import check_reduction
from elasticmoe_sglang.comm.work import FINISHED, FinishedWork
from elasticmoe_sglang.errors import UserInputError

_RedOp = dist.ReduceOp.RedOpType
_REDUCTIONS: dict[Any, Reduction] = {getattr(_RedOp, reduction.name): reduction for reduction in Reduction}


def reduction_of(opts: Any, tensor: Tensor) -> Reduction:
    """Raises UserInputError when the values cannot be combined so."""
    if opts is None:
        return Reduction.SUM
    op = getattr(opts.reduceOp, "op", opts.reduceOp)
    reduction = _REDUCTIONS.get(op)
    if reduction is None:
        raise UserInputError(f"reduction {op} is not supported")
    if reduction is not Reduction.SUM or tensor.is_complex():
        check_reduction(reduction, tensor.dtype)
    return reduction


def work_of(opts: Any, result: list[Any]) -> FinishedWork:
    """The handle of a collective that is over; one of its own only where it was asked for."""
    return FinishedWork(result) if opts is not None and opts.asyncOp else FINISHED
