# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"
"""How the ranks' kernels wait for each other: flags in the peers' windows, with system scope, and a deadline.

Every program of a launch meets the programs of the same number on the other ranks. A step is: write my part of the
window, raise my flag in each peer's window (release), wait until each peer's flag in mine is up (acquire), read the
peers' parts. Windows alternate, so one wait a step is enough: a rank that writes window p again at step n+2 has seen
every peer at step n+1, hence after its step n had ended (launches of one stream follow each other).

Which peers take part is read from the control block at every launch. A rank that is alone touches no window at all.

Times and flags enter a branch only through scalar atomics: one thread executes them and all get its result, so all
threads of a program take the same branch.

A wait ends early when the host writes the stop word, because it knows that a peer has died. A wait that outlasts the
deadline, or is stopped, writes the error word, marks this rank as failed for the rest of the epoch and raises poisoned
flags at its peers. No kernel waits after that: a replayed graph runs to its end with meaningless results, and
the host raises the error when it reads the word.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from elasticmoe_kernels.triton import windows

EPOCH = tl.constexpr(windows.EPOCH)
MEMBERS = tl.constexpr(windows.MEMBERS)
DEADLINE_NS = tl.constexpr(windows.DEADLINE_NS)
FAILED = tl.constexpr(windows.FAILED)
ERROR_ADDRESS = tl.constexpr(windows.ERROR_ADDRESS)
STOP_ADDRESS = tl.constexpr(windows.STOP_ADDRESS)
CLOCKS = tl.constexpr(windows.CLOCKS)
COUNTERS = tl.constexpr(windows.COUNTERS)
EPOCH_SHIFT = tl.constexpr(windows.EPOCH_SHIFT)
POISON_STEP = tl.constexpr(windows.POISON_STEP)
TIMED_OUT = tl.constexpr(windows.TIMED_OUT)
TOLD = tl.constexpr(windows.TOLD)
MISMATCHED = tl.constexpr(windows.MISMATCHED)
TOLD_OF_MISMATCH = tl.constexpr(windows.TOLD_OF_MISMATCH)
_POLLS_A_LOOK = tl.constexpr(64)


# The stop word is in host memory: all ranks' waiting programs together must not keep the bus busy with it. Triton's
# interpreter needs 0.1 ms for a poll.
_POLLS_A_STOP = tl.constexpr(1 << 7 if triton.knobs.runtime.interpret else 1 << 14)


@triton.jit
def word_at(address):
    """An int64 pointer to a byte address."""
    return address.to(tl.pointer_type(tl.int64))


@triton.jit
def members_of(control, group):
    """Bit i set: rank i takes part in the group's collectives now. group: the ranks that belong to it at all."""
    return tl.load(word_at(control) + MEMBERS) & group


@triton.jit
def has(ranks, rank):
    """Whether a rank's bit is set."""
    return ((ranks >> tl.cast(rank, tl.int64)) & 1) != 0


@triton.jit
def my_step(control, channel: tl.constexpr, block, BLOCKS: tl.constexpr):
    """The number of this launch's first step. Programs of one launch all find the same."""
    return tl.load(word_at(control) + COUNTERS + channel * BLOCKS + block) + 1


@triton.jit
def finish_step(control, channel: tl.constexpr, block, step, BLOCKS: tl.constexpr):
    """Remember the last step of this launch. Every program does, also one that had nothing to do."""
    tl.store(word_at(control) + COUNTERS + channel * BLOCKS + block, step)


@triton.jit
def data_at(base, pitch, rank, channel: tl.constexpr, step, DATA_OFFSET: tl.constexpr, DATA_BYTES: tl.constexpr):
    """Address of a rank's data for a step."""
    at = base + tl.cast(rank, tl.int64) * pitch + DATA_OFFSET + (channel * 2 + step % 2) * DATA_BYTES
    return tl.multiple_of(at, 16)


@triton.jit
def time_ns(control, block):
    """The device's clock in nanoseconds, the same for all threads of the program. It ticks about every microsecond."""
    clock = word_at(control) + CLOCKS + block
    tl.atomic_max(clock, globaltimer(), sem="relaxed", scope="gpu")
    return tl.atomic_add(clock, 0, sem="relaxed", scope="gpu")


@triton.jit
def _failed_epoch(control):
    """The epoch that has failed or was stopped by the host, plus one: the later of both."""
    # The host stores into its word; an atomic on host memory could overwrite that store.
    told = tl.load(word_at(tl.load(word_at(control) + STOP_ADDRESS)), volatile=True)
    tl.atomic_max(word_at(control) + FAILED, told, sem="relaxed", scope="gpu")
    return tl.atomic_add(word_at(control) + FAILED, 0, sem="relaxed", scope="gpu")


@triton.jit
def _await_flag(flag, token, control, block):
    """The flag's value once it reached the token, the deadline passed or this epoch was stopped."""
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    if seen < token:
        limit = tl.load(word_at(control) + DEADLINE_NS)
        epoch = token >> EPOCH_SHIFT
        failed = epoch - epoch
        began = time_ns(control, block)
        waited = began - began
        polls = 0
        while (seen < token) & (waited <= limit) & (failed <= epoch):
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            polls += 1
            if polls % _POLLS_A_LOOK == 0:
                waited = time_ns(control, block) - began
            if polls % _POLLS_A_STOP == 0:
                failed = _failed_epoch(control)
    return seen


@triton.jit
def _give_up(control, flags, live, epoch, kind, rank, channel: tl.constexpr, operation: tl.constexpr, step):
    """Write the error word, mark this rank as failed, poison the peers' flags."""
    packed = (tl.cast(kind, tl.int64) << 56) | (tl.cast(rank, tl.int64) << 48)
    packed = packed | (channel << 44) | (operation << 40) | step
    tl.atomic_xchg(word_at(tl.load(word_at(control) + ERROR_ADDRESS)), packed, sem="release", scope="sys")
    tl.atomic_xchg(word_at(control) + FAILED, epoch + 1, sem="release", scope="gpu")
    # A rank that comes later sees only this flag. It tells a mismatch from a timeout.
    poison = ((epoch << EPOCH_SHIFT) | POISON_STEP) + tl.where(kind >= MISMATCHED, 1, 0)
    tl.atomic_max(flags, tl.zeros_like(live.to(tl.int64)) + poison, mask=live, sem="release", scope="sys")


@triton.jit
def meet(control, base, pitch, members, me, block, step, header, channel: tl.constexpr, operation: tl.constexpr,
         CAPACITY: tl.constexpr, RANKS: tl.constexpr, BLOCKS: tl.constexpr, HEADERS: tl.constexpr):  # fmt: skip
    """Announce that my window holds this program's part of the step, and wait for the peers' programs.

    members: bits of the ranks that take part, mine among them. header: what this collective is; the first program
    compares it with the peers'. RANKS: CAPACITY rounded up to a power of two.
    """
    epoch = tl.load(word_at(control) + EPOCH)
    token = (epoch << EPOCH_SHIFT) | step
    poison = (epoch << EPOCH_SHIFT) | POISON_STEP
    rank = tl.arange(0, RANKS).to(tl.int64)
    live = (((members >> rank) & 1) != 0) & (rank != me) & (rank < CAPACITY)
    place = (channel * BLOCKS + block).to(tl.int64) * CAPACITY
    theirs = word_at(base + rank * pitch) + place + me
    slot = HEADERS // 8 + (channel * 2 + step % 2) * CAPACITY
    failed = tl.atomic_add(word_at(control) + FAILED, 0, sem="relaxed", scope="gpu") == epoch + 1
    if block == 0:
        tl.store(word_at(base + rank * pitch) + slot + me, tl.zeros_like(rank) + header, mask=live)
    tl.debug_barrier()  # every thread's part is written before any flag goes up
    tl.atomic_max(theirs, tl.zeros_like(rank) + tl.where(failed, poison, token), mask=live, sem="release", scope="sys")
    if not failed:
        mine = word_at(base + tl.cast(me, tl.int64) * pitch)
        culprit = tl.full([], -1, tl.int32)
        kind = tl.full([], 0, tl.int32)
        for other in range(CAPACITY):
            if has(members, other) & (other != me) & (culprit < 0):
                seen = _await_flag(mine + place + other, token, control, block)
                if seen < token:
                    culprit = tl.full([], 0, tl.int32) + other
                    kind = tl.full([], TIMED_OUT, tl.int32)
                elif seen >= poison:
                    culprit = tl.full([], 0, tl.int32) + other
                    kind = tl.where(seen == poison, TOLD, TOLD_OF_MISMATCH).to(tl.int32)
        tl.debug_barrier()  # what a flag allows to read, all threads may read now
        if (block == 0) & (culprit < 0):
            message = tl.load(mine + slot + rank, mask=live, other=0, volatile=True)
            differs = tl.max(tl.where(live & (message != header), rank.to(tl.int32) + 1, 0), axis=0)
            if differs > 0:
                culprit = differs - 1
                kind = tl.full([], MISMATCHED, tl.int32)
        if culprit >= 0:
            _give_up(control, theirs, live, epoch, kind, culprit, channel, operation, step)
