"""All-gather, reduce-scatter, all-reduce and broadcast among the present ranks of a group, by capturable launches.

Rows and roots are numbered by group rank, windows by global rank (`windows.py`). Nothing is read for absent ranks.
Reductions go in rank order, in float32 (float64 for float64, the type itself for integers), rounded once, so that every
rank gets the same bits. A message larger than a window goes in several launches.

All tensors are contiguous, on the windows' device. Nothing here waits for the device or allocates.

Every call takes `rendezvous`. It is called once, after the kernels of the call are loaded and before the first of them
is launched; between it and the last launch nothing calls the driver but the launches. Ranks that share a device pass a
barrier among their hosts: a kernel that waits for a peer may keep that peer's driver calls waiting (loading a module
does, also across processes under MPS), so no such kernel may run before every host has its own ready to launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

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


Rendezvous = Callable[[], None]


@dataclass(frozen=True)
class _Launch:
    """One launch of a collective kernel: positional arguments, and the constants it is compiled for."""

    kernel: Any
    blocks: int
    arguments: tuple[int, ...]
    constants: dict[str, Any]

    def load(self) -> None:
        """Compile the kernel and load its module, so that `run` calls the driver for the launch alone."""
        if not isinstance(self.kernel, JITFunction):  # Triton's interpreter loads nothing
            return
        widths = tuple(-(1 << 31) <= value < 1 << 31 for value in self.arguments)  # Triton compiles for each width
        key = (torch.cuda.current_device(), self.kernel, self.blocks, widths, *map(str, self.constants.values()))
        if key not in _loaded:
            self.kernel.warmup(*self.arguments, grid=(self.blocks,), **self.constants)[(self.blocks,)]
            _loaded.add(key)

    def run(self) -> None:
        self.kernel[(self.blocks,)](*self.arguments, **self.constants)


_loaded: set[tuple[Any, ...]] = set()
"""Kernels whose module is loaded in this process: device, kernel, programs, argument widths, constants."""


def _prepared(kernel: Any, windows: Windows, group: Group, shape: _Shape, *arguments: int, **constants: Any) -> _Launch:
    layout = windows.layout
    return _Launch(
        kernel,
        layout.blocks,
        (
            *arguments,
            group.mask,
            windows.control,
            windows.base,
            windows.pitch,
            group.global_ranks.data_ptr(),
            windows.rank,
        ),
        {
            "channel": group.channel,
            "T": shape.kind,
            "FACTOR": shape.factor,
            "LEAST": max(1, _LEAST_BYTES // shape.unit),
            "TILE": _TILE_BYTES // shape.item,
            "CAPACITY": layout.capacity,
            "RANKS": next_power_of_2(layout.capacity),
            "BLOCKS": layout.blocks,
            "HEADERS": layout.headers_offset,
            "DATA_OFFSET": layout.data_offset,
            "DATA_BYTES": layout.data_bytes,
            "num_warps": _WARPS,
            **constants,
        },
    )


def _run(launches: list[_Launch], rendezvous: Rendezvous | None) -> None:
    for launch in launches:
        launch.load()
    if rendezvous is not None:
        rendezvous()
    for launch in launches:
        launch.run()


def load_kernels(windows: Windows, group: Group, dtypes: Sequence[torch.dtype]) -> int:
    """Load what a group's collectives use for aligned tensors, so that no module is loaded at a first use.

    Args:
        dtypes: of the values that are summed.

    Returns:
        Number of kernels.
    """
    wide, narrow = _bytes_shape(_WIDE), _bytes_shape(1)
    launches = [
        _prepared(kernels.all_gather_kernel, windows, group, shape, _WIDE << 32, _WIDE << 32, 1, 1, 1 << 60, 0,
                  SIZE=group.size, ZERO=zero)
        for shape in (wide, narrow)
        for zero in (True, False)
    ]  # fmt: skip
    launches += [
        _prepared(kernels.broadcast_kernel, windows, group, shape, _WIDE << 32, 1, 1 << 60, 0)
        for shape in (wide, narrow)
    ]
    summed = [kernels.all_reduce_kernel, kernels.reduce_scatter_kernel]
    if group.size > 2:
        summed.append(kernels.all_reduce_sliced_kernel)
    for dtype in dtypes:
        shape = _values_shape(dtype, _WIDE)
        launches += [
            _prepared(kernel, windows, group, shape, _WIDE << 32, _WIDE << 32, 1, 0, 1 << 60, 0,
                      SIZE=group.size, OP=SUM, ACC=shape.accumulator)
            for kernel in summed
        ]  # fmt: skip
    for launch in launches:
        launch.load()
    return len(launches)


def all_gather(
    windows: Windows,
    group: Group,
    out: torch.Tensor,
    inp: torch.Tensor,
    *,
    zero_absent: bool,
    rendezvous: Rendezvous | None = None,
) -> None:
    """out [size * n]: row r = rank r's inp [n]; rows of absent ranks become zero or stay as they are."""
    nbytes = inp.nbytes
    _require(out.nbytes == nbytes * group.size, out, inp)
    to, of = out.data_ptr(), inp.data_ptr()
    shape = _bytes_shape(nbytes, to, of)
    launches = [
        _prepared(
            kernels.all_gather_kernel, windows, group, shape,
            to + start, of + start, piece // shape.unit, nbytes // shape.unit,
            _header(ALL_GATHER, None, 0, 0, nbytes), group.rank,
            SIZE=group.size, ZERO=zero_absent,
        )
        for start, piece in _pieces(nbytes, windows.layout.data_bytes)
    ]  # fmt: skip
    _run(launches, rendezvous)


def reduce_scatter(
    windows: Windows,
    group: Group,
    out: torch.Tensor,
    inp: torch.Tensor,
    *,
    reduction: int = SUM,
    rendezvous: Rendezvous | None = None,
) -> None:
    """out [n] = row "my rank" of the present ranks' inp [size * n], combined."""
    nbytes = out.nbytes
    _require(inp.nbytes == nbytes * group.size, out, inp)
    to, of = out.data_ptr(), inp.data_ptr()
    shape = _values_shape(out.dtype, nbytes, to, of)
    launches = [
        _prepared(
            kernels.reduce_scatter_kernel, windows, group, shape,
            to + start, of + start, piece // shape.unit, nbytes // shape.unit,
            _header(REDUCE_SCATTER, out.dtype, reduction, 0, nbytes), group.rank,
            SIZE=group.size, OP=reduction, ACC=shape.accumulator,
        )
        for start, piece in _pieces(nbytes, windows.layout.data_bytes // group.size)
    ]  # fmt: skip
    _run(launches, rendezvous)


def all_reduce(
    windows: Windows,
    group: Group,
    out: torch.Tensor,
    inp: torch.Tensor,
    *,
    reduction: int = SUM,
    sliced: bool | None = None,
    rendezvous: Rendezvous | None = None,
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
    launches = [
        _prepared(
            kernel, windows, group, shape,
            to + start, of + start, piece // shape.unit, 0,
            _header(ALL_REDUCE, out.dtype, reduction, 0, nbytes), group.rank,
            SIZE=group.size, OP=reduction, ACC=shape.accumulator,
        )
        for start, piece in _pieces(nbytes, windows.layout.data_bytes)
    ]  # fmt: skip
    _run(launches, rendezvous)


def broadcast(
    windows: Windows, group: Group, values: torch.Tensor, *, root: int, rendezvous: Rendezvous | None = None
) -> None:
    """values [n] = the root rank's; unchanged when this rank is alone or the root absent."""
    nbytes, at = values.nbytes, values.data_ptr()
    shape = _bytes_shape(nbytes, at)
    launches = [
        _prepared(
            kernels.broadcast_kernel, windows, group, shape,
            at + start, piece // shape.unit, _header(BROADCAST, None, 0, root, nbytes), root,
        )
        for start, piece in _pieces(nbytes, windows.layout.data_bytes)
    ]  # fmt: skip
    _run(launches, rendezvous)


def _require(fits: bool, out: torch.Tensor, inp: torch.Tensor) -> None:
    if not fits or out.dtype != inp.dtype or not out.is_contiguous() or not inp.is_contiguous():
        raise ShapeError(
            f"out {tuple(out.shape)} of {out.dtype} and inp {tuple(inp.shape)} of {inp.dtype} do not belong together, "
            "or are not contiguous"
        )
