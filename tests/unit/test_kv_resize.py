"""SGLang's allocator and radix cache through changes of capacity, against a model of who holds which token's KV.

The memory is a tensor with one number a row: which token of which request it holds. Whatever moves, everybody must find
their own tokens again, nobody may have a row that is not mapped, and every row belongs to somebody or is free.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe_patches.versions import api
from elasticmoe_sglang.errors import WorkerError

pytestmark = pytest.mark.process

PAGES = 96
ROWS = 64
"""Rows of the table of requests."""
LONGEST = 64


class Model:
    """A scheduler's memory side: real allocator, real radix cache, and the KV as numbers."""

    def __init__(self, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
        from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

        from elasticmoe_patches.kv_pools import CpuPagedAllocator, CpuTokenAllocator

        monkeypatch.setenv("SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND", "python")
        self.page = page
        self.memory = torch.zeros((PAGES + 1) * page, dtype=torch.int64)
        pool = SimpleNamespace(size=PAGES * page)
        pool.get_kvcache = lambda: pool
        kind = CpuTokenAllocator if page == 1 else CpuPagedAllocator
        self.allocator = kind(
            PAGES * page, page_size=page, dtype=torch.float32, device="cpu", kvcache=pool, need_sort=False
        )
        table = SimpleNamespace(req_to_token=torch.zeros((ROWS, LONGEST + 2 * page), dtype=torch.int32))
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=table,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page,
            tree_components=(ComponentType.FULL,),
        )
        self.cache = UnifiedRadixCache(params)
        self.live: list[Any] = []
        self.cached: dict[int, int] = {}
        self.next_key = 1
        self.rows = list(range(ROWS))
        empty = SimpleNamespace(reqs=[])
        part = SimpleNamespace(max_total_num_tokens=PAGES * page, max_running_requests=10)
        runner = SimpleNamespace(
            max_total_num_tokens=PAGES * page,
            max_running_requests=1000,
            memory_pool_config=SimpleNamespace(max_total_num_tokens=PAGES * page),
        )
        self.scheduler = SimpleNamespace(
            token_to_kv_pool_allocator=self.allocator,
            req_to_token_pool=table,
            tree_cache=self.cache,
            disable_radix_cache=False,
            device_module=SimpleNamespace(synchronize=lambda: None),
            running_batch=SimpleNamespace(reqs=self.live),
            last_batch=empty,
            chunked_req=None,
            chunked_prefill_size=16,
            is_mixed_chunk=False,
            waiting_queue=[],
            grammar_manager=SimpleNamespace(grammar_queue=[]),
            tp_worker=SimpleNamespace(model_runner=runner),
            model_config=SimpleNamespace(context_len=4096),
            invariant_checker=part,
            pool_stats_observer=part,
            load_inquirer=part,
            kv_events_publisher=part,
        )

    def number(self, key: int, position: int) -> int:
        return key * 1000 + position

    def tokens(self, key: int, length: int) -> array[int]:
        return array("q", [key, *range(1, length)])

    def start(self, length: int) -> bool:
        """A request whose whole pages are cached and locked, and whose rest is its own."""
        from sglang.srt.mem_cache.base_prefix_cache import InsertParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        pages = -(-length // self.page)
        if self.allocator.available_size() < pages * self.page or not self.rows:
            return False
        rows = self.allocator.alloc(pages * self.page)
        key, self.next_key = self.next_key, self.next_key + 1
        for position in range(length):
            self.memory[rows[position]] = self.number(key, position)
        row = self.rows.pop()
        table = self.scheduler.req_to_token_pool.req_to_token
        table[row, : len(rows)] = rows.to(torch.int32)
        whole = length // 2 // self.page * self.page
        node = None
        if whole:
            params = InsertParams(key=RadixKey(self.tokens(key, whole), None), value=rows[:whole])
            node = self.cache.insert(params).last_device_node
            receipt = self.cache.inc_lock_ref(node).to_dec_params()
        kv = SimpleNamespace(holds_kv=True, req_pool_idx=row, kv_allocated_len=length)
        req = SimpleNamespace(
            rid=str(key),
            key=key,
            length=length,
            whole=whole,
            node=node,
            receipt=receipt if whole else None,
            kv=kv,
            prefix_indices=rows[:whole].clone(),
            origin_input_ids=[0] * length,
            output_ids=[],
            sampling_params=SimpleNamespace(max_new_tokens=1),
            finished=lambda: False,
        )
        self.live.append(req)
        return True

    def end(self, index: int) -> None:
        """Its cached part stays in the cache, the rest is free."""
        req = self.live.pop(index % len(self.live))
        table = self.scheduler.req_to_token_pool.req_to_token
        rows = table[req.kv.req_pool_idx, : req.length].to(torch.int64)
        if req.whole < req.length:
            self.allocator.free(rows[req.whole :])
        if req.whole:
            self.cache.dec_lock_ref(req.node, req.receipt)
            self.cached[req.key] = req.whole
        self.rows.append(req.kv.req_pool_idx)

    def retract(self) -> int:
        count = len(self.live)
        while self.live:
            self.end(0)
        return count

    def resize(self, pages: int) -> Any:
        from elasticmoe_patches.worker.kv_resize import resize

        def move(rows: torch.Tensor, targets: torch.Tensor) -> None:
            assert not set(rows.tolist()) & set(targets.tolist())
            self.memory[targets] = self.memory[rows]

        before = self.allocator.size
        result = resize(self.scheduler, pages * self.page, move, self.retract)
        gone = (pages + 1) * self.page
        if self.allocator.size < before:
            self.memory[gone:] = -1  # unmapped
        return result

    def check(self) -> None:
        """Everybody finds their tokens, and all rows are accounted for as SGLang's own check does it."""
        from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        table = self.scheduler.req_to_token_pool.req_to_token
        held = 0
        for req in self.live:
            rows = table[req.kv.req_pool_idx, : req.length].to(torch.int64)
            assert self.memory[rows].tolist() == [self.number(req.key, p) for p in range(req.length)]
            own = api().prefix_rows(req)
            assert own is None or own.tolist() == rows[: req.whole].tolist()
            held += -(-req.length // self.page) * self.page - req.whole
        for key, length in self.cached.items():
            found = self.cache.match_prefix(MatchPrefixParams(key=RadixKey(self.tokens(key, length), None)))
            rows = api().matched_rows(self.cache, found)
            assert self.memory[rows].tolist() == [self.number(key, p) for p in range(len(rows))]
        size = self.allocator.size
        free = self.allocator.available_size()
        assert free + self.cache.evictable_size() + self.cache.protected_size() + held == size
        pages = self.allocator.get_all_free_pages().tolist()
        assert len(set(pages)) == len(pages) and all(1 <= page <= size // self.page for page in pages)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.integers(1, LONGEST)),
        st.tuples(st.just("end"), st.integers(0, 50)),
        st.tuples(st.just("resize"), st.integers(1, PAGES)),
    ),
    min_size=5,
    max_size=60,
)


@pytest.mark.parametrize("page", [1, 4])
@given(steps=operations)
@settings(max_examples=60, deadline=None)
def test_everybody_keeps_their_tokens(page: int, steps: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        model = Model(page, patch)
        for what, value in steps:
            if what == "start":
                model.start(value)
            elif what == "end" and model.live:
                model.end(value)
            elif what == "resize":
                before = model.allocator.size
                try:
                    result = model.resize(value)
                except WorkerError:
                    assert model.allocator.size == before
                    assert max(len(req.origin_input_ids) + 1 + page for req in model.live) > value * page
                else:
                    assert result.tokens == model.allocator.size == value * page
                    holder = model.scheduler.invariant_checker
                    assert holder.max_total_num_tokens == model.scheduler.max_total_num_tokens == value * page
            model.check()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(4, monkeypatch)


def test_free_rows_go_first_wherever_they_lie(model: Model) -> None:
    """Half is free, but not the end: what is in use moves, and no prefix is lost."""
    for _ in range(8):
        assert model.start(48)
    for _ in range(4):
        model.end(0)
    cached = dict(model.cached)
    result = model.resize(PAGES * 3 // 4)
    assert (result.evicted, result.retracted) == (0, 0) and result.moved > 0
    model.check()
    assert model.cache.evictable_size() == sum(cached.values())


def test_then_the_least_recently_used_prefixes(model: Model) -> None:
    for _ in range(8):
        assert model.start(48)
    for _ in range(7):
        model.end(0)
    cached = model.cache.evictable_size()
    result = model.resize(36)  # of 96: one request of 12 pages and the prefixes of four of the seven others
    assert result.retracted == 0 and result.evicted == cached - model.cache.evictable_size() > 0
    assert len(model.live) == 1
    model.check()


def test_running_requests_wait_only_when_nothing_else_is_left(model: Model) -> None:
    for _ in range(8):
        assert model.start(48)
    result = model.resize(PAGES // 2)
    assert result.retracted == 8
    model.check()


@pytest.mark.parametrize("mixed", [False, True])
def test_a_prompt_in_the_middle_of_its_prefill_keeps_room_for_the_rest(model: Model, mixed: bool) -> None:
    """SGLang does not look whether a later chunk fits: its scheduler once ended with "Out of memory"."""
    for _ in range(4):
        assert model.start(48)
    for _ in range(2):
        model.end(0)
    other, chunked = model.live
    other.origin_input_ids = other.origin_input_ids[:40]
    chunked.origin_input_ids = [0] * 80  # 32 tokens, two chunks, eight pages more
    model.scheduler.chunked_req, model.scheduler.is_mixed_chunk = chunked, mixed
    result = model.resize(33 if mixed else 32)  # two requests of 12 pages, the eight, and one for the other's tokens
    assert result.retracted == 0 and result.evicted > 0 and len(model.live) == 2
    free = model.allocator.available_size() + model.cache.evictable_size()
    assert free >= (9 if mixed else 8) * 4
    model.check()
    result = model.resize(30)
    assert result.retracted == 2
    model.check()


def test_a_request_that_could_never_run_again_is_not_given_up(model: Model) -> None:
    assert model.start(LONGEST)
    with pytest.raises(WorkerError, match="may need"):
        model.resize(10)
    assert model.allocator.size == PAGES * 4 and len(model.live) == 1
    model.check()


def test_rows_that_somebody_unknown_holds_are_not_given_up(model: Model) -> None:
    assert model.start(20)
    model.allocator.alloc((PAGES - 6) * 4)  # nobody knows whose they are
    model.end(0)
    with pytest.raises(WorkerError, match=r"belong to nothing|are in use"):
        model.resize(PAGES - 2)
    assert model.allocator.size == PAGES * 4


def test_limits_follow_the_capacity(model: Model) -> None:
    model.resize(20)
    scheduler = model.scheduler
    assert (scheduler.max_total_num_tokens, scheduler.max_req_len, scheduler.max_req_input_len) == (80, 79, 74)
    assert scheduler.max_running_requests == scheduler.load_inquirer.max_running_requests == 40
    assert model.allocator.get_kvcache().size == 80 and model.allocator.num_pages == 20
    model.resize(PAGES)
    assert scheduler.max_total_num_tokens == PAGES * 4 and model.allocator.available_size() == PAGES * 4
