# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call, attr-defined, assignment"
"""The kernels behind `collectives`. They work on contiguous memory given by address.

Sizes and strides are counted in units of FACTOR elements (16 bytes where addresses and sizes allow), so that the
compiler knows how wide accesses may be. Every program takes one part of the message and waits for the programs of the
same number on the other ranks; a program without a part only counts the step, except the first, which always waits, so
that no rank runs ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from elasticmoe_kernels.triton.meet import data_at, finish_step, has, meet, members_of, my_step

ROWS = tl.constexpr(8)
"""Rows that a program of an all-gather has under way at once."""
_RUNTIME = ["out", "inp", "values", "count", "stride", "header", "rank", "root", "me", "group"]
"""Never specialised: FACTOR already says how addresses are aligned, so a specialisation would only be one more module
to load while other ranks wait."""


@triton.jit
def my_part(block, count, BLOCKS: tl.constexpr, LEAST: tl.constexpr):
    """-> first and last unit of this program's part of `count` units; LEAST units at least."""
    share = tl.maximum(tl.cdiv(count, BLOCKS), LEAST)
    low = tl.minimum(block * share, count)
    return low, tl.minimum(low + share, count)


@triton.jit
def combine(total, value, OP: tl.constexpr):
    """One step of a reduction (codes of `collectives.Reduction`); the average is a sum here."""
    if OP == 4:
        return tl.minimum(total, value, propagate_nan=tl.PropagateNan.ALL)
    elif OP == 5:
        return tl.maximum(total, value, propagate_nan=tl.PropagateNan.ALL)
    else:
        return total + value


@triton.jit
def pointer(address, T: tl.constexpr, FACTOR: tl.constexpr):
    """A pointer to elements, aligned to FACTOR of them."""
    return tl.multiple_of(address.to(tl.pointer_type(T)), FACTOR * T.primitive_bitwidth // 8)


@triton.jit
def source_of(members, global_ranks, rank, me, mine, base, pitch, channel: tl.constexpr, step, offset,
              DATA_OFFSET: tl.constexpr, DATA_BYTES: tl.constexpr):  # fmt: skip
    """-> where a rank's values lie (my own: at `mine`; a peer's: `offset` bytes into its window), and whether it is
    present."""
    global_rank = tl.load(global_ranks.to(tl.pointer_type(tl.int32)) + rank)
    far = data_at(base, pitch, global_rank, channel, step, DATA_OFFSET, DATA_BYTES) + offset
    return tl.where(global_rank == me, mine, far), has(members, global_rank)


@triton.jit
def copy_units(target, source, low, high, T: tl.constexpr, FACTOR: tl.constexpr, TILE: tl.constexpr):
    """Units [low, high) from one address to another."""
    to, of = pointer(target, T, FACTOR), pointer(source, T, FACTOR)
    last = tl.cast(high, tl.int64) * FACTOR
    for start in range(low, high, 2 * TILE // FACTOR):
        at = tl.cast(start, tl.int64) * FACTOR + tl.arange(0, 2 * TILE)
        tl.store(to + at, tl.load(of + at, mask=at < last), mask=at < last)


@triton.jit
def reduce_units(target, low, high, members, global_ranks, me, mine, base, pitch, channel: tl.constexpr, step, offset,
                 SIZE: tl.constexpr, OP: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, FACTOR: tl.constexpr,
                 TILE: tl.constexpr, DATA_OFFSET: tl.constexpr, DATA_BYTES: tl.constexpr):  # fmt: skip
    """Units [low, high) of the present ranks' values, combined in rank order."""
    to = pointer(target, T, FACTOR)
    last = tl.cast(high, tl.int64) * FACTOR
    for start in range(low, high, TILE // FACTOR):
        at = tl.cast(start, tl.int64) * FACTOR + tl.arange(0, TILE)
        total = tl.zeros([TILE], ACC)
        found = 0
        for rank in tl.static_range(SIZE):
            source, present = source_of(members, global_ranks, rank, me, mine, base, pitch, channel, step, offset,
                                        DATA_OFFSET, DATA_BYTES)  # fmt: skip
            value = tl.load(pointer(source, T, FACTOR) + at, mask=(at < last) & present, other=0).to(ACC)
            if rank == 0:
                total = value
            else:
                combined = tl.where(found > 0, combine(total, value, OP), value)
                total = tl.where(present, combined, total)
            found += present.to(tl.int32)
        if OP == 2:
            total = total / found
        tl.store(to + at, total.to(T), mask=at < last)


@triton.jit(do_not_specialize=_RUNTIME)
def all_gather_kernel(out, inp, count, stride, header, rank, group, control, base, pitch, global_ranks, me,
                      channel: tl.constexpr, SIZE: tl.constexpr, ZERO: tl.constexpr, T: tl.constexpr,
                      FACTOR: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
                      RANKS: tl.constexpr, BLOCKS: tl.constexpr, HEADERS: tl.constexpr, DATA_OFFSET: tl.constexpr,
                      DATA_BYTES: tl.constexpr):  # fmt: skip
    """`count` units of out's row r (rows are `stride` units apart) = rank r's input; ZERO: absent ranks' rows too."""
    block = tl.program_id(0)
    step = my_step(control, channel, block, BLOCKS)
    members = members_of(control, group)
    low, high = my_part(block, count, BLOCKS, LEAST)
    if (block == 0) | (low < high):
        if members != (members & 0) + (1 << tl.cast(me, tl.int64)):
            copy_units(data_at(base, pitch, me, channel, step, DATA_OFFSET, DATA_BYTES), inp, low, high, T, FACTOR,
                       TILE)  # fmt: skip
            meet(control, base, pitch, members, me, block, step, header, channel, 3, CAPACITY, RANKS, BLOCKS, HEADERS)
        last = tl.cast(high, tl.int64) * FACTOR
        row_bytes = tl.cast(stride, tl.int64) * (FACTOR * T.primitive_bitwidth // 8)
        for start in range(low, high, TILE // FACTOR):
            at = tl.cast(start, tl.int64) * FACTOR + tl.arange(0, TILE)
            for first in tl.static_range(0, SIZE, ROWS):
                # All loads before the first store: a store might change what a later load reads, so none passes it.
                values = ()  # grown by +: Triton knows no unpacking
                wanted = ()
                for turn in tl.static_range(first, first + ROWS):
                    if turn < SIZE:
                        row = (rank + turn) % SIZE
                        source, present = source_of(members, global_ranks, row, me, inp, base, pitch, channel, step, 0,
                                                    DATA_OFFSET, DATA_BYTES)  # fmt: skip
                        mask = (at < last) & present
                        values = values + (tl.load(pointer(source, T, FACTOR) + at, mask=mask, other=0),)  # noqa: RUF005
                        wanted = wanted + (mask,)  # noqa: RUF005
                for turn in tl.static_range(first, first + ROWS):
                    if turn < SIZE:
                        to = pointer(out + tl.cast((rank + turn) % SIZE, tl.int64) * row_bytes, T, FACTOR)
                        if ZERO:
                            tl.store(to + at, values[turn - first], mask=at < last)
                        else:
                            tl.store(to + at, values[turn - first], mask=wanted[turn - first])
    finish_step(control, channel, block, step, BLOCKS)


@triton.jit(do_not_specialize=_RUNTIME)
def reduce_scatter_kernel(out, inp, count, stride, header, rank, group, control, base, pitch, global_ranks, me,
                          channel: tl.constexpr, SIZE: tl.constexpr, OP: tl.constexpr, T: tl.constexpr,
                          ACC: tl.constexpr, FACTOR: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr,
                          CAPACITY: tl.constexpr, RANKS: tl.constexpr, BLOCKS: tl.constexpr, HEADERS: tl.constexpr,
                          DATA_OFFSET: tl.constexpr, DATA_BYTES: tl.constexpr):  # fmt: skip
    """out = `count` units of the present ranks' rows "my rank" combined; an input row is `stride` units long."""
    block = tl.program_id(0)
    step = my_step(control, channel, block, BLOCKS)
    members = members_of(control, group)
    low, high = my_part(block, count, BLOCKS, LEAST)
    UNIT: tl.constexpr = FACTOR * T.primitive_bitwidth // 8
    row_bytes = tl.cast(stride, tl.int64) * UNIT
    kept_bytes = tl.cast(count, tl.int64) * UNIT
    if (block == 0) | (low < high):
        if members != (members & 0) + (1 << tl.cast(me, tl.int64)):
            window = data_at(base, pitch, me, channel, step, DATA_OFFSET, DATA_BYTES)
            for row in range(SIZE):
                global_rank = tl.load(global_ranks.to(tl.pointer_type(tl.int32)) + row)
                if has(members, global_rank) & (global_rank != me):
                    copy_units(window + row * kept_bytes, inp + row * row_bytes, low, high, T, FACTOR, TILE)
            meet(control, base, pitch, members, me, block, step, header, channel, 4, CAPACITY, RANKS, BLOCKS, HEADERS)
        reduce_units(out, low, high, members, global_ranks, me, inp + tl.cast(rank, tl.int64) * row_bytes, base, pitch,
                     channel, step, tl.cast(rank, tl.int64) * kept_bytes, SIZE, OP, T, ACC, FACTOR, TILE, DATA_OFFSET,
                     DATA_BYTES)  # fmt: skip
    finish_step(control, channel, block, step, BLOCKS)


@triton.jit(do_not_specialize=_RUNTIME)
def all_reduce_kernel(out, inp, count, stride, header, rank, group, control, base, pitch, global_ranks, me,
                      channel: tl.constexpr, SIZE: tl.constexpr, OP: tl.constexpr, T: tl.constexpr,
                      ACC: tl.constexpr, FACTOR: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr,
                      CAPACITY: tl.constexpr, RANKS: tl.constexpr, BLOCKS: tl.constexpr, HEADERS: tl.constexpr,
                      DATA_OFFSET: tl.constexpr, DATA_BYTES: tl.constexpr):  # fmt: skip
    """out = all present ranks' inputs combined, each rank reading the values of all. out may be inp."""
    block = tl.program_id(0)
    step = my_step(control, channel, block, BLOCKS)
    members = members_of(control, group)
    low, high = my_part(block, count, BLOCKS, LEAST)
    if (block == 0) | (low < high):
        if members != (members & 0) + (1 << tl.cast(me, tl.int64)):
            copy_units(data_at(base, pitch, me, channel, step, DATA_OFFSET, DATA_BYTES), inp, low, high, T, FACTOR,
                       TILE)  # fmt: skip
            meet(control, base, pitch, members, me, block, step, header, channel, 1, CAPACITY, RANKS, BLOCKS, HEADERS)
        reduce_units(out, low, high, members, global_ranks, me, inp, base, pitch, channel, step, 0, SIZE, OP, T, ACC,
                     FACTOR, TILE, DATA_OFFSET, DATA_BYTES)  # fmt: skip
    finish_step(control, channel, block, step, BLOCKS)


@triton.jit(do_not_specialize=_RUNTIME)
def all_reduce_sliced_kernel(out, inp, count, stride, header, rank, group, control, base, pitch, global_ranks, me,
                             channel: tl.constexpr, SIZE: tl.constexpr, OP: tl.constexpr, T: tl.constexpr,
                             ACC: tl.constexpr, FACTOR: tl.constexpr, LEAST: tl.constexpr, TILE: tl.constexpr,
                             CAPACITY: tl.constexpr, RANKS: tl.constexpr, BLOCKS: tl.constexpr, HEADERS: tl.constexpr,
                             DATA_OFFSET: tl.constexpr, DATA_BYTES: tl.constexpr):  # fmt: skip
    """The same in two steps: each present rank combines one slice, then all collect the slices. For many bytes."""
    block = tl.program_id(0)
    step = my_step(control, channel, block, BLOCKS)
    members = members_of(control, group)
    low, high = my_part(block, count, BLOCKS, LEAST)
    if (block == 0) | (low < high):
        present = 0
        before = 0
        for row in range(SIZE):
            global_rank = tl.load(global_ranks.to(tl.pointer_type(tl.int32)) + row)
            here = has(members, global_rank).to(tl.int32)
            before += here * (row < rank).to(tl.int32)
            present += here
        share = tl.cdiv(high - low, present)
        first = tl.minimum(low + before * share, high)
        if present > 1:
            copy_units(data_at(base, pitch, me, channel, step, DATA_OFFSET, DATA_BYTES), inp, low, high, T, FACTOR,
                       TILE)  # fmt: skip
            meet(control, base, pitch, members, me, block, step, header, channel, 1, CAPACITY, RANKS, BLOCKS, HEADERS)
        mine = data_at(base, pitch, me, channel, step + 1, DATA_OFFSET, DATA_BYTES)
        reduce_units(tl.where(present > 1, mine, out), first, tl.minimum(first + share, high), members, global_ranks,
                     me, inp, base, pitch, channel, step, 0, SIZE, OP, T, ACC, FACTOR, TILE, DATA_OFFSET,
                     DATA_BYTES)  # fmt: skip
        if present > 1:
            meet(control, base, pitch, members, me, block, step + 1, header, channel, 1, CAPACITY, RANKS, BLOCKS,
                 HEADERS)  # fmt: skip
            start = low
            for row in range(SIZE):
                global_rank = tl.load(global_ranks.to(tl.pointer_type(tl.int32)) + row)
                if has(members, global_rank):
                    source = data_at(base, pitch, global_rank, channel, step + 1, DATA_OFFSET, DATA_BYTES)
                    copy_units(out, source, start, tl.minimum(start + share, high), T, FACTOR, TILE)
                    start = tl.minimum(start + share, high)
    finish_step(control, channel, block, step + 1, BLOCKS)


@triton.jit(do_not_specialize=_RUNTIME)
def broadcast_kernel(values, count, header, root, group, control, base, pitch, global_ranks, me,
                     channel: tl.constexpr, T: tl.constexpr, FACTOR: tl.constexpr, LEAST: tl.constexpr,
                     TILE: tl.constexpr, CAPACITY: tl.constexpr, RANKS: tl.constexpr, BLOCKS: tl.constexpr,
                     HEADERS: tl.constexpr, DATA_OFFSET: tl.constexpr, DATA_BYTES: tl.constexpr):  # fmt: skip
    """values = the root rank's. Alone, or with the root absent, they stay as they are."""
    block = tl.program_id(0)
    step = my_step(control, channel, block, BLOCKS)
    members = members_of(control, group)
    low, high = my_part(block, count, BLOCKS, LEAST)
    global_rank = tl.load(global_ranks.to(tl.pointer_type(tl.int32)) + root)
    alone = members == (members & 0) + (1 << tl.cast(me, tl.int64))
    if ((block == 0) | (low < high)) & (not alone):
        window = data_at(base, pitch, global_rank, channel, step, DATA_OFFSET, DATA_BYTES)
        if global_rank == me:
            copy_units(window, values, low, high, T, FACTOR, TILE)
        meet(control, base, pitch, members, me, block, step, header, channel, 2, CAPACITY, RANKS, BLOCKS, HEADERS)
        if (global_rank != me) & has(members, global_rank):
            copy_units(values, window, low, high, T, FACTOR, TILE)
    finish_step(control, channel, block, step, BLOCKS)
