"""A rank's KV cache: chunks of HMM memory at the end of its address space, and windows into those of retiring ranks.

The rank maps, the HMM owns. Everything here runs in the agent's thread (or before the rank serves); jobs at the top of
the scheduler's iterations tell it which capacity it may use, and have it give up what will be unmapped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from elasticmoe_sglang.errors import BudgetExceeded, WorkerError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.kv_space import KvSpace, KvWindow, pieces_of
from elasticmoe_sglang.hmm.layout import KvLayout
from elasticmoe_sglang.planner.kv import KvShape

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_RETRY_S = 0.02
_GIVEN_BACK_S = 1.0
_CLAIMED_S = 0.05
_PART_BYTES = 256 << 20
_COPY_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Resized:
    """What a change of capacity cost, in tokens.

    evicted: from the prefix cache; moved: to other rows; retracted: requests put back into the waiting queue.
    """

    tokens: int
    evicted: int = 0
    moved: int = 0
    retracted: int = 0


@dataclass(eq=False)
class _Job:
    tokens: int
    claimed: bool = False
    done: threading.Event = field(default_factory=threading.Event)
    result: Resized | None = None
    error: Exception | None = None


class ResizeJobs:
    """New capacities for the scheduler, passed from the agent's thread to the scheduler's.

    A job that was not started before its deadline is cancelled. Where several ranks have to start theirs in the same
    iteration, a rank claims its job while it asks the others (`claim`), and it is not cancelled meanwhile.
    """

    def __init__(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._lock = threading.Lock()

    def ask(self, tokens: int, timeout_s: float, wake: Callable[[], None]) -> Resized:
        """Wait until the scheduler's capacity is `tokens`. Raises WorkerError at the deadline, or the job's error."""
        job = _Job(tokens)
        with self._lock:
            self._jobs.append(job)
        wake()
        job.done.wait(timeout_s)
        while not self._cancel(job, timeout_s):
            job.done.wait(_CLAIMED_S)
        job.done.wait()  # it has started, so it ends
        if job.error is not None:
            raise job.error
        assert job.result is not None
        return job.result

    def _cancel(self, job: _Job, timeout_s: float) -> bool:
        """False while the job is claimed, True when it has started. Raises WorkerError when it never will."""
        with self._lock:
            if job not in self._jobs or job.claimed:
                return job not in self._jobs
            self._jobs.remove(job)
        raise WorkerError(
            f"the scheduler did not change its KV capacity to {job.tokens} tokens within {timeout_s:.0f} s",
            hint="Its event loop does not run; its log says why",
        )

    def claim(self) -> int | None:
        """The next job's capacity in tokens; it waits for `run_claimed` or `unclaim`. None: there is none."""
        with self._lock:
            if not self._jobs:
                return None
            self._jobs[0].claimed = True
            return self._jobs[0].tokens

    def unclaim(self) -> None:
        """The claimed job is not started now."""
        with self._lock:
            self._jobs[0].claimed = False

    def run_claimed(self, resize: Callable[[int], Resized]) -> None:
        """Start the claimed job, in the scheduler's thread."""
        with self._lock:
            job = self._jobs.popleft()
        self._do(job, resize)

    def run(self, resize: Callable[[int], Resized]) -> None:
        """In the scheduler's thread, at the top of an iteration."""
        while self._jobs:
            with self._lock:
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            self._do(job, resize)

    def _do(self, job: _Job, resize: Callable[[int], Resized]) -> None:
        try:
            job.result = resize(job.tokens)
        except Exception as error:
            job.error = error
        job.done.set()


class WorkerKv:
    """Args:
    client: this process's HMM client.
    max_chunks: how many chunks the address space is reserved for.

    Attributes:
        space: where the chunks are mapped.
        jobs: for the scheduler.
    """

    def __init__(
        self, client: HmmClient, *, rank: int, device: int, shape: KvShape, layout: KvLayout, max_chunks: int
    ) -> None:
        assert shape.token_bytes == layout.token_bytes
        self._client = client
        self._rank = rank
        self._device = device
        self._pieces = pieces_of(layout, shape.chunk_bytes)
        self._blocks: list[list[int]] = []  # of each chunk
        self._lock = threading.Lock()
        self._rows: tuple[torch.Tensor, ...] | None = None
        self.shape = shape
        self.layout = layout
        self.jobs = ResizeJobs()
        self.space = KvSpace(
            client.backend, layout, chunk_bytes=shape.chunk_bytes, max_chunks=max_chunks, device=device
        )

    @property
    def chunks(self) -> int:
        """Mapped now."""
        return self.space.chunks

    @property
    def rows(self) -> tuple[torch.Tensor, ...]:
        """All tokens in their order in memory, see `KvSpace.rows`."""
        if self._rows is None:
            self._rows = self.space.rows()
        return self._rows

    def open(self, chunks: int, txn: str | None, deadline_s: float) -> None:
        """Map the first chunks, before the rank serves. Blocks of an earlier worker of this rank are released.

        If the budget does not allow all of them, as many as it does; the coordinator asks for the rest later.

        Raises:
            BudgetExceeded: it does not allow the fewest that a rank needs.
        """
        old = self._client.lookup(kind="kv", rank=self._rank)
        if old:
            self._client.release([block.block_id for block in old])
        self._add_what_fits(max(chunks, self.shape.least_chunks), txn, deadline_s)

    def _add_what_fits(self, wanted: int, txn: str | None, deadline_s: float) -> None:
        deadline = time.monotonic() + deadline_s
        while True:
            try:
                return self._add(wanted, txn)
            except BudgetExceeded as error:
                # Memory of a process that is just ending is freed within moments.
                fits = (error.free or 0) // self.shape.chunk_bytes
                if time.monotonic() < deadline:
                    time.sleep(_RETRY_S)
                elif self.chunks + fits >= self.shape.least_chunks:
                    logger.warning("rank %d: memory for %d of %d chunks of KV", self._rank, fits, wanted)
                    wanted = fits
                else:
                    raise

    def resize_idle(self, chunks: int, txn: str | None, apply: Callable[[int], Resized]) -> None:
        """Like `resize`, in the scheduler's own thread while it serves nothing; growing takes as many as there are.

        Args:
            apply: adopts a capacity in tokens.
            txn: of new memory.
        """
        with self._lock:
            if chunks > self.chunks:
                self._add_what_fits(chunks - self.chunks, txn, _GIVEN_BACK_S)
            wanted = min(chunks, self.chunks)
            apply(self.shape.tokens(wanted))
            self._remove(self.chunks - wanted)

    def resize(self, chunks: int, timeout_s: float, wake: Callable[[], None]) -> Resized:
        """Change the number of chunks. New ones are mapped before the scheduler uses them; what it gave up is unmapped
        after.

        Raises:
            BudgetExceeded: no memory. WorkerError: the scheduler cannot give up so much, or does not answer.
        """
        with self._lock:
            if chunks > self.chunks:
                self._add_soon(chunks - self.chunks, timeout_s)
            result = self.jobs.ask(self.shape.tokens(chunks), timeout_s, wake)
            self._remove(self.chunks - chunks)
            return result

    def _add_soon(self, count: int, timeout_s: float) -> None:
        """What another process is releasing at this moment is free after the HMM's next round."""
        deadline = time.monotonic() + min(timeout_s, _GIVEN_BACK_S)
        while True:
            try:
                return self._add(count, None)
            except BudgetExceeded:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_RETRY_S)

    def window(self, retiring_rank: int, chunks: Sequence[int]) -> KvWindow:
        """Chunks of a retiring rank's KV cache, to copy from. Raises WorkerError when they are gone."""
        wanted = sorted(set(chunks))
        blocks = {
            block.chunk: block.block_id
            for block in self._client.lookup(kind="kv", rank=retiring_rank)
            if block.chunk is not None
        }
        numbers = {chunk: self._numbers(chunk) for chunk in wanted}
        if missing := [chunk for chunk in wanted if not blocks.keys() >= set(numbers[chunk])]:
            raise WorkerError(f"chunks {missing} of rank {retiring_rank}'s KV cache are gone", rank=self._rank)
        handles = iter(self._client.handles([blocks[number] for chunk in wanted for number in numbers[chunk]]))
        return KvWindow(
            self._client.backend,
            {chunk: [next(handles) for _ in numbers[chunk]] for chunk in wanted},
            self.layout,
            chunk_bytes=self.shape.chunk_bytes,
            device=self._device,
        )

    def _numbers(self, chunk: int) -> range:
        """By which the HMM knows a chunk's pieces."""
        return range(chunk * len(self._pieces), (chunk + 1) * len(self._pieces))

    def _add(self, count: int, txn: str | None) -> None:
        """All or none. In parts, so that the HMM can answer others in between."""
        before, part = self.chunks, max(1, _PART_BYTES // self.shape.chunk_bytes)
        try:
            while (left := before + count - self.chunks) > 0:
                self._add_part(min(part, left), txn)
        except BaseException:
            self._remove(self.chunks - before)
            raise

    def _add_part(self, count: int, txn: str | None) -> None:
        chunks = range(self.chunks, self.chunks + count)
        ids = self._allocate(chunks, txn)
        wanted = [ids[number] for chunk in chunks for number in self._numbers(chunk)]
        try:
            handles = self._client.handles(wanted)
        except BaseException:
            self._client.release(wanted)
            raise
        self._blocks += [[ids[number] for number in self._numbers(chunk)] for chunk in chunks]
        pieces = len(self._pieces)
        for start in range(0, len(handles), pieces):
            try:
                self.space.map_chunk(*handles[start : start + pieces])
            except BaseException:
                for rest in handles[start + pieces :]:
                    self._client.backend.close(rest)
                raise

    def _allocate(self, chunks: range, txn: str | None) -> dict[int, int]:
        """Memory for all pieces of these chunks, or none: number -> block. A call for each size of a piece."""
        ids: dict[int, int] = {}
        try:
            for size in dict.fromkeys(self._pieces):
                numbers = [
                    number
                    for chunk in chunks
                    for number, piece in zip(self._numbers(chunk), self._pieces, strict=True)
                    if piece == size
                ]
                blocks = self._client.allocate(
                    self._device, "kv", rank=self._rank, chunks=numbers, nbytes=size, txn=txn
                )
                ids.update(zip(numbers, (block.block_id for block in blocks), strict=True))
        except BaseException:
            if ids:
                self._client.release(list(ids.values()))
            raise
        return ids

    def _remove(self, count: int) -> None:
        for _ in range(count):
            self.space.unmap_chunk()
        gone = [block for blocks in self._blocks[self.chunks :] for block in blocks]
        del self._blocks[self.chunks :]
        if gone:
            self._client.release(gone)


def chunks_of(pages: Sequence[int], shape: KvShape) -> list[int]:
    """The chunks that contain these pages, ascending."""
    found: set[int] = set()
    for page in set(pages):
        start = page * shape.page_bytes
        found.update(range(start // shape.chunk_bytes, (start + shape.page_bytes - 1) // shape.chunk_bytes + 1))
    return sorted(found)


Rows = Sequence[Any]
"""`rows` of a KV cache or a window: a tensor for each of its ranges."""


def copy_tokens(target: Rows, target_rows: torch.Tensor, source: Rows, source_rows: torch.Tensor) -> None:
    """target[target_rows] = source[source_rows], for `rows` of one or two KV caches; target rows are distinct.

    In one cache no row may be both. In parts, because each goes through memory of its own. On an NPU by copies of what
    lies together instead: those may reach into another device's memory, which kernels there are not known to.
    """
    if target[0].device.type == "npu":
        return copy_stretches(target, target_rows, source, source_rows)
    for there, here in zip(target, source, strict=True):
        part = max(1, _COPY_BYTES // (there.shape[1] * there.itemsize))
        for start in range(0, len(target_rows), part):
            wanted = here.index_select(0, source_rows[start : start + part])
            there.index_copy_(0, target_rows[start : start + part], wanted)


def copy_stretches(target: Rows, target_rows: torch.Tensor, source: Rows, source_rows: torch.Tensor) -> None:
    """`copy_tokens` by a copy for each stretch of rows that follow each other on both sides."""
    stretches = list(_stretches(target_rows.tolist(), source_rows.tolist()))
    for there, here in zip(target, source, strict=True):
        for to, since, length in stretches:
            there[to : to + length].copy_(here[since : since + length])


def _stretches(targets: Sequence[int], sources: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first target, first source, length) of each."""
    start = 0
    for index in range(1, len(targets) + 1):
        together = (
            index < len(targets)
            and targets[index] == targets[index - 1] + 1
            and sources[index] == sources[index - 1] + 1
        )
        if not together:
            yield targets[start], sources[start], index - start
            start = index
