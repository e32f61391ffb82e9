# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"
"""Which rows a program of a grouped product works on.

Two ways, chosen by the number of tokens:
- sorted: `route` has put the pairs in expert order; a program's block has one slot and up to BLOCK_M rows.
- direct: at most BLOCK_M tokens. No routing launch at all: the grid has one program row for each pair, and the program
  of the first pair that names a slot takes every token that names it. A token names a slot at most once, so BLOCK_M
  rows always suffice. Rows are pairs here: row t * K + k.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elasticmoe_kernels.triton.route import slots_of


@triton.jit
def direct_rows(ids_ptr, table_ptr, block, tokens, top_k, K_P2: tl.constexpr, BLOCK_M: tl.constexpr,
                HAS_TABLE: tl.constexpr):  # fmt: skip
    """-> slot (-1: this program has nothing to do), row [BLOCK_M] (its pair), valid [BLOCK_M]."""
    token = tl.arange(0, BLOCK_M)
    k = tl.arange(0, K_P2)
    pair = token[:, None] * top_k + k[None, :]
    mask = (token[:, None] < tokens) & (k[None, :] < top_k)
    slots = slots_of(ids_ptr, table_ptr, pair, mask, HAS_TABLE)
    slot = tl.max(tl.max(tl.where(pair == block, tl.where(k[None, :] < top_k, slots, -1), -1), axis=1), axis=0)
    same = (slots == slot) & mask
    earlier = tl.sum(tl.sum((same & (pair < block)).to(tl.int32), axis=1), axis=0)
    row = tl.max(tl.where(same, pair, -1), axis=1)
    return tl.where(earlier == 0, slot, -1), tl.maximum(row, 0), row >= 0


@triton.jit
def block_and_column(tile, num_blocks, num_columns, GROUP_M: tl.constexpr):
    """Tile number -> (row block, column block): GROUP_M row blocks go together over the columns.

    Blocks are in expert order, so a group mostly shares one weight matrix, and the columns it streams stay in L2.
    """
    per_group = GROUP_M * num_columns
    group = tile // per_group
    first = group * GROUP_M
    size = tl.minimum(num_blocks - first, GROUP_M)
    inside = tile - group * per_group
    return first + inside % size, inside // size
