"""The attention plan and its calls against a loop over requests and heads in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe_patches.platform.sdpa_plan import Group, attend, plan
from elasticmoe_sglang.errors import UnsupportedFeature

POOL_ROWS = 4096
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests whose cached and new tokens lie scattered in one pool, as an allocator with pages would leave them."""

    req_to_token: torch.Tensor
    req_pool_indices: torch.Tensor
    prefix_lens: list[int]
    extend_lens: list[int]
    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor | None
    value_width: int
    window: int | None = None
    sinks: torch.Tensor | None = None

    def plan(self) -> list[Group]:
        return plan(
            self.req_to_token, self.req_pool_indices, self.prefix_lens, self.extend_lens, self.q.dtype, self.window
        )

    def run(self) -> torch.Tensor:
        out = self.q.new_zeros((self.q.shape[0], self.q.shape[1], self.value_width))
        for group in self.plan():
            attend(group, self.q, self.keys, self.values, out, self.scale, self.sinks)
        return out

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.q.shape[2])

    def reference(self) -> torch.Tensor:
        """One query at a time, every head on its own, in float64."""
        shared = self.q.shape[1] // self.keys.shape[1]
        rows = []
        for request, (prefix, extend) in enumerate(zip(self.prefix_lens, self.extend_lens, strict=True)):
            table = self.req_to_token[self.req_pool_indices[request]].long()
            for step in range(extend):
                first = 0 if self.window is None else max(0, prefix + step - self.window)
                seen = table[first : prefix + step + 1]
                key = self.keys[seen].double().repeat_interleave(shared, dim=1)
                value = key if self.values is None else self.values[seen].double().repeat_interleave(shared, dim=1)
                scores = torch.einsum("lhd,hd->hl", key, self.q[len(rows)].double()) * self.scale
                if self.sinks is not None:  # one more score, of a value that is zero
                    scores = torch.cat([scores, self.sinks.double()[:, None]], 1)
                    value = torch.cat([value, torch.zeros_like(value[:1])])
                rows.append(torch.einsum("hl,lhd->hd", scores.softmax(1), value)[:, : self.value_width])
        padding = [torch.zeros_like(rows[0])] * (self.q.shape[0] - len(rows))
        return torch.stack([*rows, *padding])


def make_batch(
    prefix_lens: Sequence[int],
    extend_lens: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    value_width: int | None = None,
    latent: bool = False,
    page: int = 1,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    seed: int = 0,
    window: int | None = None,
    sinks: bool = False,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    totals = [p + e for p, e in zip(prefix_lens, extend_lens, strict=True)]
    pages = iter((torch.randperm(POOL_ROWS // page - 1, generator=generator) + 1).tolist())
    # What a table holds past a request's end is left over from others and may be any row.
    shape = (len(totals) + 3, max(totals) + 7)
    table = torch.randint(0, POOL_ROWS, shape, generator=generator, dtype=torch.int32)
    indices = torch.randperm(len(totals) + 3, generator=generator)[: len(totals)]
    for index, total in zip(indices.tolist(), totals, strict=True):
        own = itertools.islice(pages, -(-total // page))
        rows = [first * page + offset for first in own for offset in range(page)]
        table[index, :total] = torch.tensor(rows[:total], dtype=torch.int32)
    keys = torch.randn(POOL_ROWS, kv_heads, width, generator=generator).to(dtype)
    return Batch(
        req_to_token=table,
        req_pool_indices=indices,
        prefix_lens=list(prefix_lens),
        extend_lens=list(extend_lens),
        q=torch.randn(sum(extend_lens) + padding, heads, width, generator=generator).to(dtype),
        keys=keys,
        values=None if latent else torch.randn(POOL_ROWS, kv_heads, width, generator=generator).to(dtype),
        value_width=value_width or width,
        window=window,
        sinks=torch.randn(heads, generator=generator).bfloat16() if sinks else None,
    )


def assert_matches(batch: Batch) -> None:
    torch.testing.assert_close(
        batch.run().double(), batch.reference(), atol=TOLERANCE[batch.q.dtype], rtol=TOLERANCE[batch.q.dtype]
    )


BATCHES = pytest.mark.parametrize(
    ("prefix", "extend"),
    [
        pytest.param([7], [1], id="decode-one"),
        pytest.param([5, 5, 5], [1, 1, 1], id="decode-equal"),
        pytest.param([0, 9, 300, 31], [1, 1, 1, 1], id="decode-ragged"),
        pytest.param([0], [13], id="prefill-one"),
        pytest.param([0, 0], [13, 13], id="prefill-equal"),
        pytest.param([0, 0, 0], [13, 2, 40], id="prefill-ragged"),
        pytest.param([64], [32], id="chunk"),
        pytest.param([64, 0, 17], [32, 5, 1], id="prefix-and-new"),
        pytest.param([250, 3, 90, 0, 64], [1, 1, 1, 70, 20], id="mixed-with-decode"),
    ],
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page", [1, 16])
@BATCHES
def test_matches_reference(prefix: list[int], extend: list[int], page: int, dtype: torch.dtype) -> None:
    assert_matches(make_batch(prefix, extend, page=page, dtype=dtype))


@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("window", [None, 0, 7, 31, 127])
@BATCHES
def test_windows_and_sinks(prefix: list[int], extend: list[int], window: int | None, sinks: bool) -> None:
    """Windows shorter than a chunk, longer than a request, and of the query's own key alone."""
    assert_matches(make_batch(prefix, extend, window=window, sinks=sinks, page=4))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_of_grouped_heads(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    for extend in ([1, 1, 1], [4, 9, 1]):
        batch = make_batch([11, 0, 40], extend, heads=heads, kv_heads=kv_heads, sinks=True, window=8, dtype=dtype)
        assert_matches(batch)


def test_keys_outside_the_window_are_not_read() -> None:
    batch = make_batch([3, 900], [1, 1], window=31)
    for request, prefix in enumerate(batch.prefix_lens):
        gone = batch.req_to_token[batch.req_pool_indices[request], : max(0, prefix - 31)].long()
        assert batch.values is not None
        batch.keys[gone] = batch.values[gone] = torch.nan
    assert_matches(batch)
    assert max(group.keys for group in batch.plan()) == 32


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (4, 4), (6, 2), (8, 1)])
def test_grouped_heads(heads: int, kv_heads: int) -> None:
    assert_matches(make_batch([11, 0, 40], [1, 1, 1], heads=heads, kv_heads=kv_heads))
    assert_matches(make_batch([11, 0, 40], [4, 9, 1], heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_cache(dtype: torch.dtype) -> None:
    """Absorbed MLA: one key head, whose first columns are the value."""
    for prefix, extend in (([7, 60], [1, 1]), ([0, 0], [12, 30]), ([33, 0], [5, 1])):
        assert_matches(
            make_batch(prefix, extend, heads=8, kv_heads=1, width=24, value_width=16, latent=True, dtype=dtype)
        )


def test_padding_rows_stay_zero() -> None:
    batch = make_batch([4, 9], [1, 1], padding=3)
    assert torch.count_nonzero(batch.run()[2:]) == 0
    assert_matches(batch)


def test_rows_of_others_cannot_reach_a_request() -> None:
    """Not even as not-a-number: a hidden value is multiplied by a weight of zero, and 0 * nan is nan."""
    batch = make_batch([3, 90], [1, 1])
    mine = batch.req_to_token[batch.req_pool_indices[0], :4].long()
    other = batch.req_to_token[batch.req_pool_indices[1], :91].long()
    foreign = torch.ones(POOL_ROWS, dtype=torch.bool)
    foreign[mine] = foreign[other] = False
    assert batch.values is not None
    batch.keys[foreign] = batch.values[foreign] = torch.nan
    assert_matches(batch)


def test_calls_do_not_grow_with_the_batch() -> None:
    equal = make_batch([50] * 32, [1] * 32)
    assert len(equal.plan()) == 1
    ragged = make_batch([2 ** (i % 9) for i in range(64)], [1] * 64)
    assert len(ragged.plan()) <= 4


lengths = st.lists(st.tuples(st.integers(0, 70), st.integers(1, 40)), min_size=1, max_size=8)


@pytest.mark.process
@settings(max_examples=60, deadline=None)
@given(
    lengths=lengths,
    decode=st.booleans(),
    page=st.sampled_from([1, 4]),
    window=st.sampled_from([None, 1, 12, 50]),
    seed=st.integers(0, 99),
)
def test_any_batch(lengths: list[tuple[int, int]], decode: bool, page: int, window: int | None, seed: int) -> None:
    extend = [1 if decode else new for _, new in lengths]
    kind: dict[str, Any] = {"heads": 2, "kv_heads": 1, "width": 8, "window": window, "sinks": bool(seed % 2)}
    batch = make_batch([cached for cached, _ in lengths], extend, page=page, seed=seed, **kind)
    groups = batch.plan()
    assert sum(group.requests for group in groups) == len(lengths), "every request is in one group"
    cached = [length if window is None else min(length, window) for length in batch.prefix_lens]
    useful = sum(e * (p + e) for p, e in zip(cached, batch.extend_lens, strict=True))
    padded = sum(group.requests * group.queries * group.keys for group in groups)
    assert padded <= 4 * useful + 64 * sum(extend) + 4096, "padding is bounded"
    assert_matches(batch)


def test_empty_batch() -> None:
    nobody = torch.tensor([], dtype=torch.int64)
    assert plan(torch.zeros((2, 4), dtype=torch.int32), nobody, [], [], torch.float32) == []


def runner(**layer: object) -> SimpleNamespace:
    """As much of SGLang's ModelRunner as the check at launch looks at, with one attention layer."""
    from sglang.srt.layers.radix_attention import RadixAttention

    model = torch.nn.Sequential(RadixAttention(2, 8, 1.0, 2, 0, **layer))
    none = SimpleNamespace(is_none=lambda: True)
    pool = SimpleNamespace(dtype=torch.float32)
    return SimpleNamespace(spec_algorithm=none, token_to_kv_pool=pool, dtype=torch.float32, model=model)


@pytest.mark.process
@pytest.mark.parametrize(
    ("layer", "need"),
    [({"logit_cap": 30.0}, "logit cap"), ({"is_cross_attention": True}, "cross attention")],
    ids=["cap", "cross"],
)
def test_models_that_need_more_are_refused(layer: dict[str, object], need: str) -> None:
    from elasticmoe_patches.platform.sdpa_backend import refuse_unsupported

    refuse_unsupported(runner())
    refuse_unsupported(runner(sliding_window_size=128))
    with pytest.raises(UnsupportedFeature, match=need):
        refuse_unsupported(runner(**layer))


@pytest.mark.process
def test_flags_that_need_more_are_refused() -> None:
    from elasticmoe_patches.platform.sdpa_backend import refuse_unsupported

    speculative = runner()
    speculative.spec_algorithm = SimpleNamespace(is_none=lambda: False)
    with pytest.raises(UnsupportedFeature, match="speculative"):
        refuse_unsupported(speculative)
    quantised = runner()
    quantised.token_to_kv_pool.dtype = torch.float8_e4m3fn
    with pytest.raises(UnsupportedFeature, match="--kv-cache-dtype"):
        refuse_unsupported(quantised)


@pytest.mark.process
def test_a_second_pool_for_windows_is_refused() -> None:
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    from elasticmoe_patches.platform.sdpa_backend import refuse_unsupported

    two_pools = runner(sliding_window_size=128)
    two_pools.token_to_kv_pool = SWAKVPool.__new__(SWAKVPool)
    two_pools.token_to_kv_pool.dtype = torch.float32
    with pytest.raises(UnsupportedFeature, match="--disable-hybrid-swa-memory"):
        refuse_unsupported(two_pools)
