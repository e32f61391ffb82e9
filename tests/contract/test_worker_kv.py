"""A rank's KV cache in a real HMM: chunks come and go at its end, a retiring rank's are read from there, nothing
leaks."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe_sglang.errors import BudgetExceeded, UserInputError, VmmError, WorkerError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.kv_space import KvSpace
from elasticmoe_sglang.hmm.layout import KvLayout
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from elasticmoe_sglang.planner import KvShape
from elasticmoe_sglang.worker.kv import Resized, WorkerKv, chunks_of, copy_tokens
from tests.helpers.load import settled

PAGE = 4096
BUDGET = 64 * PAGE
LAYOUT = KvLayout.of([(f"{layer}.{part}", (2, 6), torch.float32) for layer in range(3) for part in ("k", "v")])
SHAPE = KvShape(token_bytes=LAYOUT.token_bytes, page_tokens=4, chunk_bytes=2 * PAGE, least_tokens=8)
"""A token takes 384 bytes, so that chunks begin in the middle of tokens."""
WAIT_S = 20.0


@pytest.fixture
def budgets() -> list[int]:
    return [BUDGET] * 2


class Worker:
    """A rank's KV with a scheduler of its own: a thread that takes over whatever capacity it is asked for."""

    def __init__(self, endpoint: str, rank: int, max_chunks: int = 32) -> None:
        self.client = HmmClient(endpoint, name=f"rank-{rank}")
        self.kv = WorkerKv(self.client, rank=rank, device=rank, shape=SHAPE, layout=LAYOUT, max_chunks=max_chunks)
        self.capacity = 0
        self.refuse: Exception | None = None
        self.at_resize: Callable[[], None] = lambda: None
        self._wake = threading.Event()
        self._end = False
        self._thread = threading.Thread(target=self._schedule)

    def __enter__(self) -> Worker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = True
        self._wake.set()
        self._thread.join(WAIT_S)
        self.client.close()

    def _schedule(self) -> None:
        while not self._end:
            self._wake.wait()
            self._wake.clear()
            self.kv.jobs.run(self._take_over)

    def _take_over(self, tokens: int) -> Resized:
        self.at_resize()
        if self.refuse is not None:
            raise self.refuse
        self.capacity = tokens
        return Resized(tokens=tokens)

    def resize(self, chunks: int) -> Resized:
        return self.kv.resize(chunks, WAIT_S, self._wake.set)

    def fill(self, seed: int) -> torch.Tensor:
        """Random numbers in every row that may be used."""
        rows = SHAPE.tokens(self.kv.chunks) + SHAPE.page_tokens
        content = torch.randint(
            1 << 60, (rows, self.kv.rows[0].shape[1]), generator=torch.Generator().manual_seed(seed)
        )
        self.kv.rows[0][:rows] = content
        return content


def used(rank: Worker) -> int:
    return rank.client.status().devices[rank.kv._device].by_kind.get("kv", 0)


def test_capacity_follows_the_chunks(hmm: HmmProcess) -> None:
    with Worker(hmm.endpoint, 0) as rank:
        rank.kv.open(5, None, WAIT_S)
        content = rank.fill(1)
        for chunks in (9, 3, 30, 1, 12):
            result = rank.resize(chunks)
            assert result.tokens == rank.capacity == SHAPE.tokens(chunks)
            assert used(rank) == chunks * SHAPE.chunk_bytes
            keep = min(len(content), rank.capacity + SHAPE.page_tokens)
            content = content[:keep]
            assert torch.equal(rank.kv.rows[0][:keep], content), "what stays is not touched"
        assert rank.client.status().retired_blocks == 0


def test_chunks_are_mapped_before_the_scheduler_hears_and_unmapped_after(hmm: HmmProcess) -> None:
    with Worker(hmm.endpoint, 0) as rank:
        rank.kv.open(4, None, WAIT_S)
        seen: list[int] = []
        rank.at_resize = lambda: seen.append(rank.kv.chunks)
        rank.resize(8)
        rank.resize(2)
        assert seen == [8, 8]
        assert rank.kv.chunks == 2


def test_a_scheduler_that_cannot_let_go_keeps_everything(hmm: HmmProcess) -> None:
    with Worker(hmm.endpoint, 0) as rank:
        rank.kv.open(6, None, WAIT_S)
        content = rank.fill(2)
        rank.refuse = WorkerError("a request needs it")
        with pytest.raises(WorkerError, match="needs it"):
            rank.resize(2)
        assert rank.kv.chunks == 6 and used(rank) == 6 * SHAPE.chunk_bytes
        assert torch.equal(rank.kv.rows[0][: len(content)], content)
        rank.refuse = None
        assert rank.resize(2).tokens == SHAPE.tokens(2)


def test_a_job_that_came_too_late_never_happens(hmm: HmmProcess) -> None:
    with Worker(hmm.endpoint, 0) as rank:
        rank.kv.open(6, None, WAIT_S)
        with pytest.raises(WorkerError, match="did not change its KV capacity"):
            rank.kv.resize(2, 0.05, lambda: None)  # nobody wakes the scheduler
        assert rank.kv.chunks == 6
        rank._wake.set()
        assert rank.resize(7).tokens == rank.capacity == SHAPE.tokens(7)


def test_no_room_changes_nothing(hmm: HmmProcess) -> None:
    with Worker(hmm.endpoint, 0, max_chunks=64) as rank:
        rank.kv.open(4, None, WAIT_S)
        rank.client.allocate(0, "other", nbytes=BUDGET - 10 * SHAPE.chunk_bytes)
        with pytest.raises(BudgetExceeded):
            rank.resize(20)
        assert rank.kv.chunks == 4 and used(rank) == 4 * SHAPE.chunk_bytes
        assert rank.resize(10).tokens == SHAPE.tokens(10)


def test_a_first_share_that_does_not_fit_is_what_there_is_room_for(hmm: HmmProcess) -> None:
    with HmmClient(hmm.endpoint, name="weights") as other:
        [block] = other.allocate(0, "other", nbytes=BUDGET - 3 * SHAPE.chunk_bytes)
        with Worker(hmm.endpoint, 0) as rank:
            rank.kv.open(10, None, 0.1)
            assert rank.kv.chunks == 3
        other.release([block.block_id])
        other.release([block.block_id for block in other.lookup(kind="kv")])
        other.allocate(0, "other", nbytes=BUDGET)
        with Worker(hmm.endpoint, 0) as rank, pytest.raises(BudgetExceeded):
            rank.kv.open(1, None, 0.1)


def test_who_takes_the_rank_again_drops_what_was_there(hmm: HmmProcess) -> None:
    with Worker(hmm.endpoint, 0, max_chunks=70) as first:
        first.kv.open(8, None, WAIT_S)
    with HmmClient(hmm.endpoint, name="look") as look:
        assert len(look.lookup(kind="kv", rank=0)) == 8, "the HMM owns it, not the process"
    with Worker(hmm.endpoint, 0, max_chunks=70) as second:
        second.kv.open(3, None, WAIT_S)
        assert len(second.client.lookup(kind="kv", rank=0)) == second.kv.chunks
        assert used(second) == second.kv.chunks * SHAPE.chunk_bytes


def test_a_joining_rank_s_chunks_go_with_its_transaction(hmm: HmmProcess) -> None:
    with HmmClient(hmm.endpoint, name="coordinator") as coordinator:
        txn = coordinator.begin("change")
        with Worker(hmm.endpoint, 1) as rank:
            rank.kv.open(5, txn, WAIT_S)
        coordinator.rollback(txn)
        # The HMM hears of the worker's end, and of its leases with it, a moment later.
        settled(lambda: coordinator.status().devices[1].used == 0, WAIT_S, "the chunks are given back")


def test_another_hmm_takes_the_chunks_over_and_the_cache_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    endpoint = f"ipc://{folder}/hmm.sock"
    with spawn_hmm(endpoint, [BUDGET] * 2) as first, Worker(endpoint, 1) as rank:
        rank.kv.open(6, None, WAIT_S)
        content = rank.fill(5)
        first.process.kill()
        first.process.wait()
        with spawn_hmm(endpoint, [BUDGET] * 2):
            assert rank.client.offer() == 6
            blocks = rank.client.lookup(kind="kv", rank=1)
            assert sorted(block.chunk or 0 for block in blocks) == list(range(6))
            assert used(rank) == 6 * SHAPE.chunk_bytes
            with Worker(endpoint, 0) as survivor:
                survivor.kv.open(2, None, WAIT_S)
                window = survivor.kv.window(1, [1, 2])
                assert torch.equal(window.rows()[0][30:50], content[30:50])
                window.close()
            rank.resize(3)
            rank.resize(9)
            assert used(rank) == 9 * SHAPE.chunk_bytes


def test_chunks_of_a_rank_are_one_each(hmm: HmmProcess) -> None:
    with HmmClient(hmm.endpoint, name="c") as client:
        blocks = client.allocate(0, "kv", rank=3, chunks=[0, 1], nbytes=PAGE)
        assert [(block.rank, block.chunk) for block in blocks] == [(3, 0), (3, 1)]
        with pytest.raises(UserInputError, match="already"):
            client.allocate(0, "kv", rank=3, chunks=[1, 2], nbytes=PAGE)
        assert client.allocate(0, "kv", rank=4, chunks=[1, 2], nbytes=PAGE)
        for wrong in ({"rank": 1}, {"chunks": [1]}, {"rank": 1, "chunks": []}, {"rank": 1, "chunks": [1, 1]}):
            with pytest.raises(UserInputError):
                client.allocate(0, "kv", nbytes=PAGE, **wrong)  # type: ignore[arg-type]
        with pytest.raises(UserInputError):
            client.allocate(0, "other", rank=1, chunks=[1], nbytes=PAGE)
        assert len(client.lookup(kind="kv", rank=3)) == 2


def test_a_retiring_rank_s_pages_are_copied_out_of_its_memory_after_it_has_gone(hmm: HmmProcess) -> None:
    pages = [5, 2, 11]
    with Worker(hmm.endpoint, 1) as survivor:
        survivor.kv.open(12, None, WAIT_S)
        with Worker(hmm.endpoint, 0) as retiring_rank:
            retiring_rank.kv.open(12, None, WAIT_S)
            content = retiring_rank.fill(3)
        chunks = chunks_of(pages, SHAPE)
        window = survivor.kv.window(0, chunks)
        there = torch.tensor([page * 4 + token for page in pages for token in range(4)])
        here = torch.tensor(range(40, 52))
        before = survivor.fill(4)
        copy_tokens(survivor.kv.rows, here, window.rows(), there)
        assert torch.equal(survivor.kv.rows[0][here], content[there])
        before[here] = content[there]
        assert torch.equal(survivor.kv.rows[0][: len(before)], before), "nothing else was touched"
        survivor.client.release([block.block_id for block in survivor.client.lookup(kind="kv", rank=0)])
        assert survivor.client.status().devices[0].used > 0, "the window still has it mapped"
        window.close()
        assert survivor.client.status().devices[0].used == 0
        with pytest.raises(WorkerError, match="gone"):
            survivor.kv.window(0, chunks)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=10))
def test_every_byte_of_a_page_lies_in_its_chunks(pages: list[int]) -> None:
    needed = {
        byte // SHAPE.chunk_bytes
        for page in pages
        for byte in range(page * SHAPE.page_bytes, (page + 1) * SHAPE.page_bytes)
    }
    assert chunks_of(pages, SHAPE) == sorted(needed)


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 1 << 16))
@settings(max_examples=50, deadline=None)
def test_the_space_against_a_plain_tensor(steps: list[bool], seed: int) -> None:
    """Growing and shrinking by a chunk, writing through the views of layers and reading whole rows."""
    backend = CpuBackend()
    rng = random.Random(seed)
    space = KvSpace(backend, LAYOUT, chunk_bytes=2 * PAGE, max_chunks=8)
    model = torch.zeros((space.max_tokens, LAYOUT.token_bytes // 8), dtype=torch.int64)
    views, (rows,) = space.views(), space.rows()
    known = 0
    for grow in steps:
        if grow and space.chunks < space.max_chunks:
            space.map_chunk(backend.create(2 * PAGE, 0))
        elif not grow and space.chunks:
            space.unmap_chunk()
        usable = space.chunks * 2 * PAGE // LAYOUT.token_bytes
        # What a token that was given up in part holds when it comes back is nobody's business.
        model[known:usable] = rows[known:usable]
        known = usable
        for _ in range(min(usable, 3)):
            token, name = rng.randrange(usable), rng.choice(list(views))
            value = torch.rand((2, 6), generator=torch.Generator().manual_seed(rng.randrange(1 << 30)))
            views[name][torch.tensor([token])] = value[None]
            start = LAYOUT.offsets[name] // 4
            model.view(torch.float32)[token, start : start + 12] = value.flatten()
        same = torch.equal(rows[:usable], model[:usable])
        assert same
        if usable:
            picked = torch.randint(usable, (5,), generator=torch.Generator().manual_seed(seed))
            for name in views:
                start = LAYOUT.offsets[name] // 4
                expected = model.view(torch.float32)[picked, start : start + 12].reshape(5, 2, 6)
                read = views[name].index_select(0, picked)
                assert torch.equal(read, expected)
    if space.chunks == space.max_chunks:
        extra = backend.create(2 * PAGE, 0)
        with pytest.raises(VmmError):
            space.map_chunk(extra)
    del views, rows
    gc.collect()  # pytest keeps parts of the assertions above
    space.close()
    usage = backend.usage()
    assert (usage.reserved_bytes, usage.mapped_bytes, usage.open_handles) == (0, 0, 0)
