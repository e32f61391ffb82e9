# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"
"""Routing: expert ids -> slots -> rows in expert order, padded to whole blocks.

Every expert's rows start at a multiple of `block_m`, so that one block of rows needs one weight matrix. Pairs whose
expert is not here (slot -1) get no row. One launch up to `SINGLE` pairs, two above. The place of a pair among the rows
of its expert comes from an atomic counter and may differ from run to run; no result depends on it, since each row's
product is computed by itself and the combine sums in the order of k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from elasticmoe_kernels.triton.launch import next_power_of_2, pdl_options

CHUNK = 2048
"""Pairs one program sorts."""
SINGLE = 4096
"""Up to this many pairs one program does it all: a second launch would cost more than the longer chunk."""


_ALIGNED = 4
"""int32 words in 16 bytes."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where each pair's row lies.

    pair_of_row: int32 [capacity], written for valid rows only. row_of_pair: int32 [T * K], -1 = absent.
    block_slot, block_rows: int32 [blocks]; slot and number of valid rows. num_blocks: int32 [1].
    """

    pair_of_row: torch.Tensor
    row_of_pair: torch.Tensor
    block_slot: torch.Tensor
    block_rows: torch.Tensor
    num_blocks: torch.Tensor
    block_m: int

    @property
    def capacity_blocks(self) -> int:
        return int(self.block_slot.shape[0])


@triton.jit
def slots_of(ids_ptr, table_ptr, index, mask, HAS_TABLE: tl.constexpr):
    """ids[index] -> slot, -1 where masked, absent (id -1) or not on this rank (table says -1)."""
    ids = tl.load(ids_ptr + index, mask=mask, other=-1).to(tl.int32)
    if HAS_TABLE:
        return tl.load(table_ptr + ids, mask=ids >= 0, other=-1)
    return ids


@triton.jit(do_not_specialize=["pairs"])
def _count_kernel(ids_ptr, table_ptr, counts_ptr, pairs, HAS_TABLE: tl.constexpr, CHUNK_: tl.constexpr,
                  SLOTS_P2: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    index = chunk * CHUNK_ + tl.arange(0, CHUNK_)
    slots = slots_of(ids_ptr, table_ptr, index, index < pairs, HAS_TABLE)
    here = slots >= 0
    histogram = tl.histogram(tl.where(here, slots, 0), SLOTS_P2, mask=here)
    tl.store(counts_ptr + chunk * SLOTS_P2 + tl.arange(0, SLOTS_P2), histogram)


@triton.jit(do_not_specialize=["pairs", "num_chunks"])
def _scatter_kernel(ids_ptr, table_ptr, counts_ptr, cursor_ptr, pair_of_row_ptr, row_of_pair_ptr, block_slot_ptr,
                    block_rows_ptr, num_blocks_ptr, pairs, num_chunks, BLOCK_M: tl.constexpr,
                    HAS_TABLE: tl.constexpr, CHUNK_: tl.constexpr, CHUNKS_P2: tl.constexpr, SLOTS_P2: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    index = chunk * CHUNK_ + tl.arange(0, CHUNK_)
    mask = index < pairs
    slots = slots_of(ids_ptr, table_ptr, index, mask, HAS_TABLE)
    here = slots >= 0
    every = tl.arange(0, SLOTS_P2)
    if CHUNKS_P2 == 1:
        totals = tl.histogram(tl.where(here, slots, 0), SLOTS_P2, mask=here)
        earlier = tl.zeros((SLOTS_P2,), dtype=tl.int32)
    else:
        chunks = tl.arange(0, CHUNKS_P2)
        counts = tl.load(
            counts_ptr + chunks[:, None] * SLOTS_P2 + every[None, :], mask=chunks[:, None] < num_chunks, other=0
        )
        totals = tl.sum(counts, axis=0)
        earlier = tl.sum(tl.where(chunks[:, None] < chunk, counts, 0), axis=0)
    blocks = (totals + BLOCK_M - 1) // BLOCK_M
    block_end = tl.cumsum(blocks, axis=0)
    first_block = block_end - blocks
    tl.store(cursor_ptr + chunk * SLOTS_P2 + every, first_block * BLOCK_M + earlier)
    tl.debug_barrier()  # the counters of this program are in memory before anything is added to them
    row = tl.atomic_add(cursor_ptr + chunk * SLOTS_P2 + tl.where(here, slots, 0), 1, mask=here, sem="relaxed")
    tl.store(pair_of_row_ptr + row, index, mask=here)
    tl.store(row_of_pair_ptr + index, tl.where(here, row, -1), mask=mask)
    most = tl.max(blocks, axis=0)
    for j in range(chunk, most, num_chunks):
        inside = j < blocks
        tl.store(block_slot_ptr + first_block + j, every, mask=inside)
        tl.store(block_rows_ptr + first_block + j, tl.minimum(totals - j * BLOCK_M, BLOCK_M), mask=inside)
    if chunk == 0:
        tl.store(num_blocks_ptr, tl.sum(blocks, axis=0))


def max_blocks(pairs: int, num_slots: int, block_m: int) -> int:
    """Blocks that `pairs` rows over `num_slots` experts can need at most: one begun block for each expert."""
    experts = min(pairs, num_slots)
    return experts + (pairs - experts) // block_m


def chunks_of(pairs: int) -> tuple[bool, int, int]:
    """Whether one program sorts all pairs; how many a program sorts; how many programs."""
    single = pairs <= SINGLE
    chunk = max(64, next_power_of_2(pairs)) if single else CHUNK
    return single, chunk, triton.cdiv(pairs, chunk)


def route(
    topk_ids: torch.Tensor, slot_table: torch.Tensor | None, *, num_slots: int, mapped_slots: int, block_m: int,
    pdl: bool = False,
) -> Routing:  # fmt: skip
    """topk_ids [T, K] int32/int64 (-1 = none) -> Routing.

    slot_table: int32 [experts], slot or -1; None when `topk_ids` are slots already. num_slots bounds
    every slot id; at most mapped_slots different ones occur.
    """
    pairs = topk_ids.numel()
    device = topk_ids.device
    capacity = max_blocks(pairs, mapped_slots, block_m)
    single, chunk, num_chunks = chunks_of(pairs)
    slots_p2 = max(16, next_power_of_2(num_slots))
    scratch = torch.empty(2 * num_chunks * slots_p2, dtype=torch.int32, device=device)
    counts, cursor = scratch.split(num_chunks * slots_p2)
    table = topk_ids if slot_table is None else slot_table
    # Every part starts at a multiple of 16 bytes, or Triton compiles the kernels for each alignment that occurs.
    sizes = [capacity * block_m, pairs, capacity, capacity, 1]
    parts = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
    room = torch.empty(sum(parts), dtype=torch.int32, device=device).split(parts)
    pair_of_row, row_of_pair, block_slot, block_rows, num_blocks = (
        part[:size] for part, size in zip(room, sizes, strict=True)
    )
    warps = 4 if chunk <= 512 else 8
    if not single:
        _count_kernel[(num_chunks,)](
            topk_ids, table, counts, pairs, HAS_TABLE=slot_table is not None, CHUNK_=chunk, SLOTS_P2=slots_p2, PDL=pdl,
            num_warps=warps, **pdl_options(pdl),
        )  # fmt: skip
    _scatter_kernel[(num_chunks,)](
        topk_ids, table, counts, cursor, pair_of_row, row_of_pair, block_slot, block_rows, num_blocks, pairs,
        num_chunks, BLOCK_M=block_m, HAS_TABLE=slot_table is not None, CHUNK_=chunk,
        CHUNKS_P2=1 if single else next_power_of_2(num_chunks), SLOTS_P2=slots_p2, PDL=pdl, num_warps=warps,
        **pdl_options(pdl),
    )  # fmt: skip
    return Routing(
        pair_of_row=pair_of_row, row_of_pair=row_of_pair, block_slot=block_slot, block_rows=block_rows,
        num_blocks=num_blocks, block_m=block_m,
    )  # fmt: skip
