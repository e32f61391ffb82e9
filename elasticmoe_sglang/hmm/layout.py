"""Where each tensor of a block lies: names, shapes and dtypes packed one after the other. Torch-free data.

Offsets are multiples of 64 bytes, a cache line and the widest vector load, so that any kernel may read aligned.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.hmm.vmm.base import round_up

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Bytes of one element, by torch's name of the dtype."""

_LayoutT = TypeVar("_LayoutT", bound="PackedLayout")


@dataclass(frozen=True)
class TensorSpec:
    """One contiguous tensor. dtype is torch's name of it, such as "bfloat16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise UserInputError(f"tensor {self.name} has dtype {self.dtype}, which no layout knows")
        if any(size < 0 for size in self.shape):
            raise UserInputError(f"tensor {self.name} has the impossible shape {self.shape}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class PackedLayout:
    """Tensors packed in the given order.

    offsets: bytes from the start of the block, by name; nbytes: of the whole block, before rounding up to pages.
    """

    specs: tuple[TensorSpec, ...]
    offsets: dict[str, int] = field(init=False, compare=False)
    nbytes: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.specs]
        if len(set(names)) != len(names):
            raise UserInputError("the tensors of a layout need distinct names")
        sizes = [round_up(spec.nbytes, ALIGNMENT) for spec in self.specs]
        starts = list(itertools.accumulate(sizes, initial=0))
        object.__setattr__(self, "offsets", dict(zip(names, starts, strict=False)))
        object.__setattr__(self, "nbytes", starts[-1])

    @classmethod
    def of(cls: type[_LayoutT], tensors: Iterable[tuple[str, Iterable[int], str | torch.dtype]]) -> _LayoutT:
        """From (name, shape, dtype) triples; dtype is a torch.dtype or its name."""
        return cls(tuple(TensorSpec(n, tuple(shape), str(dtype).removeprefix("torch.")) for n, shape, dtype in tensors))

    def fingerprint(self) -> str:
        """Equal for equal names, shapes, dtypes and order."""
        return hashlib.sha256(repr(self.specs).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ColumnLayout(PackedLayout):
    """One expert over all layers, such as ("layers.0.w13", [2I, H], bfloat16), ("layers.0.w2", [H, I], bfloat16)."""

    @property
    def column_bytes(self) -> int:
        return self.nbytes


@dataclass(frozen=True)
class DenseLayout(PackedLayout):
    """Everything of a model that is no routed expert, in one block."""

    @property
    def dense_bytes(self) -> int:
        return self.nbytes


@dataclass(frozen=True)
class KvLayout(PackedLayout):
    """Keys and values of one token over all layers, such as ("0.k", [heads, width], bfloat16), ("0.v", ...), ...

    Tokens lie one after the other, each with all of its tensors.
    """

    @property
    def token_bytes(self) -> int:
        return self.nbytes

    @property
    def piece_bytes(self) -> tuple[int, ...]:
        """Bytes of a token in each of the address ranges over which its tensors are spread: one range here."""
        return (self.token_bytes,)

    def place(self, name: str) -> tuple[int, int]:
        """A tensor's range and its offset in the token's bytes there."""
        return 0, self.offsets[name]

    def chunk_unit(self, granularity: int) -> int:
        """Bytes of which the size of a chunk is a multiple, so that it can be mapped."""
        return granularity


@dataclass(frozen=True)
class KvPlanes(KvLayout):
    """The same with a range for each tensor: the tokens of a layer's keys follow each other without gaps.

    For attention that takes no strides. A chunk is a piece of memory in every range, all for the same tokens.
    """

    @property
    def token_bytes(self) -> int:
        return sum(self.piece_bytes)

    @property
    def piece_bytes(self) -> tuple[int, ...]:
        return tuple(spec.nbytes for spec in self.specs)

    def place(self, name: str) -> tuple[int, int]:
        return [spec.name for spec in self.specs].index(name), 0

    def chunk_unit(self, granularity: int) -> int:
        tokens = math.lcm(*(granularity // math.gcd(granularity, size) for size in self.piece_bytes))
        return tokens * self.token_bytes
