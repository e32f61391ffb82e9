"""The header of a collective: one word that describes it, by which members find out whether they called the same.

Bits: operation 5 | reduction 4 | root 7 | dtype 6 | bytes 42, from the highest down.
"""

from __future__ import annotations

from enum import IntEnum

import torch

from elasticmoe_sglang.errors import UserInputError


class Op(IntEnum):
    """The collectives. The kernels of `elasticmoe_kernels.triton.collectives` use the same numbers for 1 to 4."""

    ALLREDUCE = 1
    BROADCAST = 2
    ALLGATHER = 3
    REDUCE_SCATTER = 4
    GATHER = 5
    REDUCE = 6
    BARRIER = 7
    LAUNCH = 8
    """Of a collective on the device: its hosts meet before they launch it."""
    REPLAY = 9
    """Of a captured graph with collectives in it."""


class Reduction(IntEnum):
    """How values are combined; 0 in a header means none."""

    SUM = 1
    AVG = 2
    PRODUCT = 3
    MIN = 4
    MAX = 5
    BAND = 6
    BOR = 7
    BXOR = 8


_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
_NBYTES_BITS, _DTYPE_BITS, _ROOT_BITS, _REDUCTION_BITS = 42, 6, 7, 4
_DTYPE_SHIFT = _NBYTES_BITS
_ROOT_SHIFT = _DTYPE_SHIFT + _DTYPE_BITS
_REDUCTION_SHIFT = _ROOT_SHIFT + _ROOT_BITS
_OP_SHIFT = _REDUCTION_SHIFT + _REDUCTION_BITS

DTYPE_FIELD = {dtype: (number + 1) << _DTYPE_SHIFT for number, dtype in enumerate(_DTYPES)}
"""dtype -> its bits in a header."""


def dtype_field(tensor: torch.Tensor) -> int:
    """A tensor's dtype as bits of a header.

    Raises:
        UserInputError: not a CPU tensor, or a dtype that no collective carries.
    """
    if not tensor.is_cpu:
        raise UserInputError(f"the elastic process group carries CPU tensors, not {tensor.device}")
    field = DTYPE_FIELD.get(tensor.dtype)
    if field is None:
        raise UserInputError(f"the elastic process group does not carry {tensor.dtype}")
    return field


def pack_header(op: Op, *, dtype_field: int = 0, nbytes: int = 0, root: int = 0, reduction: int = 0) -> int:
    """Args:
    dtype_field: from `DTYPE_FIELD`.
    nbytes: size of one rank's whole message, below 4 TiB.
    root: group rank of the root or source; for LAUNCH the `Op` that is launched.
    reduction: a `Reduction`.
    """
    return op << _OP_SHIFT | reduction << _REDUCTION_SHIFT | root << _ROOT_SHIFT | dtype_field | nbytes


def _name(op: int) -> str:
    return Op(op).name.lower() if op in Op._value2member_map_ else f"operation {op}"


def describe_header(header: int) -> str:
    """A header in words, such as `broadcast(root=0, dtype=int64, 8 bytes)`."""
    op = header >> _OP_SHIFT
    name = _name(op)
    root = header >> _ROOT_SHIFT & ((1 << _ROOT_BITS) - 1)
    if op == Op.LAUNCH:
        name = f"launch of {_name(root)}"
    parts = []
    reduction = header >> _REDUCTION_SHIFT & ((1 << _REDUCTION_BITS) - 1)
    if reduction:
        parts.append(Reduction(reduction).name.lower())
    if op in (Op.BROADCAST, Op.GATHER, Op.REDUCE):
        parts.append(f"root={root}")
    dtype = header >> _DTYPE_SHIFT & ((1 << _DTYPE_BITS) - 1)
    if dtype:
        parts.append(f"dtype={str(_DTYPES[dtype - 1]).removeprefix('torch.')}")
    if op not in (Op.BARRIER, Op.REPLAY):
        parts.append(f"{header & ((1 << _NBYTES_BITS) - 1)} bytes")
    return f"{name}({', '.join(parts)})"
