"""Block sizes for Ascend 910B and 910C cores, and the check that they fit.

Sizes are those of one AI core of Atlas A2/A3 (CANN's developer guide, "basic architecture"): a cube core has 512 KiB
L1, 64 KiB L0A, 64 KiB L0B and 128 KiB L0C; each of its vector cores has 192 KiB unified buffer (UB), moved in units of
32 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from elasticmoe_kernels.errors import ShapeError

KIB = 1024
L1, L0A, L0B, L0C, UB = 512 * KIB, 64 * KIB, 64 * KIB, 128 * KIB, 192 * KIB
MOVE = 32
# triton-ascend keeps two copies of a buffer, so that the next block loads while this one is worked on.
COPIES = 2


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Block sizes of one launch of the layer, in elements.

    block_m, block_n, block_k: rows, output columns and depth of a GEMM tile.
    block_h, block_i: columns of one step of gather/combine and of SwiGLU.
    """

    block_m: int
    block_n: int
    block_k: int
    block_h: int
    block_i: int

    def check(self, itemsize: int) -> None:
        """Raises ShapeError when a block of elements of `itemsize` bytes does not fit its buffer or is misaligned."""
        left, right = self.block_m * self.block_k * itemsize, self.block_n * self.block_k * itemsize
        sum_bytes = self.block_m * self.block_n * 4
        needs = {
            "L0A": (left * COPIES, L0A),
            "L0B": (right * COPIES, L0B),
            "L1": ((left + right) * COPIES, L1),
            "L0C": (sum_bytes, L0C),
            # The result leaves through a vector core: float32 in, the output's dtype out.
            "UB, GEMM": (sum_bytes + self.block_m * self.block_n * itemsize, UB),
            "UB, gather": (self.block_h * itemsize * COPIES, UB),
            # float32 sum, one row as loaded, the same in float32, its product, the rounded result
            "UB, combine": (self.block_h * (4 + itemsize + 4 + 4 + itemsize) * COPIES, UB),
            # gate and up as loaded and in float32, four float32 temporaries of silu, the rounded result
            "UB, SwiGLU": (self.block_i * (2 * itemsize + 2 * 4 + 4 * 4 + itemsize) * COPIES, UB),
        }
        for name, (need, room) in needs.items():
            if need > room:
                raise ShapeError(f"{self} needs {need} bytes of {name}, a core has {room}")
        for name, block in (("block_k", self.block_k), ("block_n", self.block_n), ("block_h", self.block_h)):
            if block * itemsize % MOVE:
                raise ShapeError(f"{name} = {block} elements of {itemsize} bytes is no multiple of {MOVE} bytes")


def tiles_for(rows: int, groups: int, itemsize: int) -> Tiles:
    """Blocks for `rows` rows spread over `groups` experts: small row blocks for decode, large ones for prefill.

    The cube multiplies 16 x 16 blocks, so 16 rows is the least that wastes nothing it could save.
    """
    share = -(-rows // max(groups, 1))
    block_m = next((size for size in (16, 32, 64) if share <= size), 128)
    deep = 256 // itemsize
    return Tiles(block_m=block_m, block_n=128, block_k=deep, block_h=2048, block_i=1024)
