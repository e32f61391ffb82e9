"""All-gather, reduce-scatter, all-reduce and broadcast among the present ranks of a group: one launch each, capturable.

Rows and roots are numbered by group rank, windows by global rank (`windows.py`). Nothing is read for absent ranks.
Reductions go in rank order, in float32 (float64 for float64, the type itself for integers), rounded once, so that every
rank gets the same bits. A message larger than a window goes in several launches.

All tensors are contiguous, on the windows' device. Nothing here waits for the device or allocates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from elasticmoe_kernels.errors import ShapeError
from elasticmoe_kernels.triton import collective_kernels as kernels
from elasticmoe_kernels.triton.launch import next_power_of_2
from elasticmoe_kernels.triton.windows import Windows

ALL_REDUCE, BROADCAST, ALL_GATHER, REDUCE_SCATTER = 1, 2, 3, 4
"""Operations, in headers and error words."""
SUM, AVERAGE, MINIMUM, MAXIMUM = 1, 2, 4, 5
"""Reductions."""

_WIDE = 16
_WARPS = 16
_TILE_BYTES = 32 * 32 * _WARPS
"""Two 16-byte accesses a thread are under way at once."""
_LEAST_BYTES = 4096
"""A program takes no smaller part: waiting for its peers costs more than copying that."""
_SLICED_BYTES = 512 << 10
"""From this size on, an all-reduce among more than two ranks goes in two steps."""

_TYPES: dict[torch.dtype, tuple[Any, Any]] = {
    torch.bfloat16: (tl.bfloat16, tl.float32),
    torch.float16: (tl.float16, tl.float32),
    torch.float32: (tl.float32, tl.float32),
    torch.float64: (tl.float64, tl.float64),
    torch.int32: (tl.int32, tl.int32),
    torch.int64: (tl.int64, tl.int64),
}
REDUCED_DTYPES = tuple(_TYPES)
"""Dtypes that can be reduced; any dtype can be gathered or broadcast."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The ranks of a group, for kernels.

    channel: of the windows; all groups that share one have the same ranks and are used on one stream.
    rank: my group rank; size: number of ranks; mask: bit i set for global rank i; global_ranks: int32 [size], of each
    group rank, on the device.
    """

    channel: int
    rank: int
    size: int
    mask: int
    global_ranks: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """How one launch accesses its memory: `factor` elements of `item` bytes are a unit."""

    kind: Any
    accumulator: Any
    item: int
    factor: int

    @property
    def unit(self) -> int:
        return self.item * self.factor


def _bytes_shape(nbytes: int, *addresses: int) -> _Shape:
    """For plain copies, which ignore the dtype."""
    if any(value % _WIDE for value in (nbytes, *addresses)):
        return _Shape(kind=tl.uint8, accumulator=None, item=1, factor=1)
    return _Shape(kind=tl.int64, accumulator=None, item=8, factor=2)


def _values_shape(dtype: torch.dtype, nbytes: int, *addresses: int) -> _Shape:
    kind, accumulator = _TYPES[dtype]
    aligned = not any(value % _WIDE for value in (nbytes, *addresses))
    return _Shape(
        kind=kind,
        accumulator=accumulator,
        item=dtype.itemsize,
        factor=_WIDE // dtype.itemsize if aligned else 1,
    )


def _header(operation: int, dtype: torch.dtype | None, reduction: int, root: int, nbytes: int) -> int:
    """One word that describes a collective: ranks compare it to find out whether they launched the same."""
    code = 0 if dtype is None else 1 + REDUCED_DTYPES.index(dtype)
    return operation << 58 | code << 54 | reduction << 50 | root << 44 | nbytes


def _pieces(nbytes: int, room: int) -> Iterator[tuple[int, int]]:
    """(start, bytes) of what fits a window each; one empty piece for an empty message."""
    room = room // _WIDE * _WIDE
    for start in range(0, max(nbytes, 1), room):
        yield start, min(room, nbytes - start)


def _launch(kernel: Any, windows: Windows, group: Group, shape: _Shape, *arguments: Any, **options: Any) -> None:
    layout = windows.layout
    kernel[(layout.blocks,)](
        *arguments,
        group.mask,
        windows.control,
        windows.base,
        windows.pitch,
        group.global_ranks.data_ptr(),
        windows.rank,
        channel=group.channel,
        T=shape.kind,
        FACTOR=shape.factor,
        LEAST=max(1, _LEAST_BYTES // shape.unit),
        TILE=_TILE_BYTES // shape.item,
        CAPACITY=layout.capacity,
        RANKS=next_power_of_2(layout.capacity),
        BLOCKS=layout.blocks,
        HEADERS=layout.headers_offset,
        DATA_OFFSET=layout.data_offset,
        DATA_BYTES=layout.data_bytes,
        num_warps=_WARPS,
        **options,
    )


def all_gather(windows: Windows, group: Group, out: torch.Tensor, inp: torch.Tensor, *, zero_absent: bool) -> None:
    """out [size * n]: row r = rank r's inp [n]; rows of absent ranks become zero or stay as they are."""
    nbytes = inp.nbytes
    _require(out.nbytes == nbytes * group.size, out, inp)
    to, of = out.data_ptr(), inp.data_ptr()
    shape = _bytes_shape(nbytes, to, of)
    for start, piece in _pieces(nbytes, windows.layout.data_bytes):
        _launch(
            kernels.all_gather_kernel, windows, group, shape,
            to + start, of + start, piece // shape.unit, nbytes // shape.unit,
            _header(ALL_GATHER, None, 0, 0, nbytes), group.rank,
            SIZE=group.size, ZERO=zero_absent,
        )  # fmt: skip


def reduce_scatter(
    windows: Windows, group: Group, out: torch.Tensor, inp: torch.Tensor, *, reduction: int = SUM
) -> None:
    """out [n] = row "my rank" of the present ranks' inp [size * n], combined."""
    nbytes = out.nbytes
    _require(inp.nbytes == nbytes * group.size, out, inp)
    to, of = out.data_ptr(), inp.data_ptr()
    shape = _values_shape(out.dtype, nbytes, to, of)
    for start, piece in _pieces(nbytes, windows.layout.data_bytes // group.size):
        _launch(
            kernels.reduce_scatter_kernel, windows, group, shape,
            to + start, of + start, piece // shape.unit, nbytes // shape.unit,
            _header(REDUCE_SCATTER, out.dtype, reduction, 0, nbytes), group.rank,
            SIZE=group.size, OP=reduction, ACC=shape.accumulator,
        )  # fmt: skip


def all_reduce(
    windows: Windows,
    group: Group,
    out: torch.Tensor,
    inp: torch.Tensor,
    *,
    reduction: int = SUM,
    sliced: bool | None = None,
) -> None:
    """out [n] = the present ranks' inp [n] combined. out may be inp.

    sliced: in two steps, for many bytes; None decides by size, on every rank alike.
    """
    nbytes = inp.nbytes
    _require(out.nbytes == nbytes, out, inp)
    to, of = out.data_ptr(), inp.data_ptr()
    shape = _values_shape(out.dtype, nbytes, to, of)
    if sliced is None:
        sliced = group.size > 2 and nbytes >= _SLICED_BYTES
    kernel: Callable[..., Any] = kernels.all_reduce_sliced_kernel if sliced else kernels.all_reduce_kernel
    for start, piece in _pieces(nbytes, windows.layout.data_bytes):
        _launch(
            kernel, windows, group, shape,
            to + start, of + start, piece // shape.unit, 0,
            _header(ALL_REDUCE, out.dtype, reduction, 0, nbytes), group.rank,
            SIZE=group.size, OP=reduction, ACC=shape.accumulator,
        )  # fmt: skip


def broadcast(windows: Windows, group: Group, values: torch.Tensor, *, root: int) -> None:
    """values [n] = the root rank's; unchanged when this rank is alone or the root absent."""
    nbytes, at = values.nbytes, values.data_ptr()
    shape = _bytes_shape(nbytes, at)
    for start, piece in _pieces(nbytes, windows.layout.data_bytes):
        _launch(
            kernels.broadcast_kernel, windows, group, shape,
            at + start, piece // shape.unit, _header(BROADCAST, None, 0, root, nbytes), root,
        )  # fmt: skip


def _require(fits: bool, out: torch.Tensor, inp: torch.Tensor) -> None:
    if not fits or out.dtype != inp.dtype or not out.is_contiguous() or not inp.is_contiguous():
        raise ShapeError(
            f"out {tuple(out.shape)} of {out.dtype} and inp {tuple(inp.shape)} of {inp.dtype} do not belong together, "
            "or are not contiguous"
        )
