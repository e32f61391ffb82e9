"""How much KV each rank gets: the device is full, and no more than full."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.planner import KvDevice, KvShape, kv_shape

MIB = 1 << 20
shapes = st.builds(
    kv_shape,
    token_bytes=st.integers(1, 2000).map(lambda n: 64 * n),
    page_tokens=st.sampled_from([1, 16, 64]),
    granularity=st.sampled_from([4096, 2 * MIB]),
    budget=st.integers(64 * MIB, 200 << 30),
    ranks=st.integers(1, 4),
    cap_tokens=st.none() | st.integers(128, 1 << 22),
)


@given(shapes, st.integers(1, 1 << 20))
def test_the_fewest_chunks_hold_the_tokens(shape: KvShape, tokens: int) -> None:
    chunks = shape.chunks(tokens)
    free = KvShape(
        token_bytes=shape.token_bytes, page_tokens=shape.page_tokens, chunk_bytes=shape.chunk_bytes, cap_tokens=None
    )
    assert free.tokens(chunks) >= tokens
    assert chunks == 1 or free.tokens(chunks - 1) < tokens


@given(shapes, st.integers(0, 5000))
def test_whole_pages_that_lie_inside_the_chunks(shape: KvShape, chunks: int) -> None:
    tokens = shape.tokens(chunks)
    assert tokens % shape.page_tokens == 0
    assert tokens == 0 or (tokens + shape.page_tokens) * shape.token_bytes <= chunks * shape.chunk_bytes
    assert shape.cap_tokens is None or tokens <= shape.cap_tokens


@given(
    st.integers(1 << 30, 200 << 30),
    st.integers(1, 4),
    st.floats(0, 0.6),
    st.integers(1, 2000).map(lambda n: 64 * n),
)
def test_a_device_is_full_and_never_too_full(budget: int, ranks: int, weights: float, token_bytes: int) -> None:
    shape = kv_shape(token_bytes=token_bytes, page_tokens=1, granularity=2 * MIB, budget=budget, ranks=ranks)
    device = KvDevice(
        budget=budget, headroom=budget // 100, weights=int(budget * weights), others=0, ranks=range(ranks)
    )
    targets = device.targets(shape)
    used = int(budget * weights) + sum(targets.values()) * shape.chunk_bytes
    assert used <= budget - budget // 100
    assert used >= 0.97 * budget, "97 % in use, whatever the sizes"
    assert len(set(targets.values())) == 1


@given(st.integers(128, 1 << 20), st.sampled_from([1, 16]))
def test_a_cap_is_met_exactly(cap: int, page: int) -> None:
    shape = kv_shape(token_bytes=4096, page_tokens=page, granularity=4096, budget=64 << 30, cap_tokens=cap)
    chunks = shape.share(64 << 30, 1)
    assert shape.tokens(chunks) == cap // page * page
    assert chunks * shape.chunk_bytes <= 1.02 * (cap + 2 * page) * 4096 + 4096


def test_no_room_is_no_chunk() -> None:
    shape = kv_shape(token_bytes=4096, page_tokens=1, granularity=4096, budget=MIB)
    assert KvDevice(budget=MIB, headroom=0, weights=2 * MIB, others=0, ranks=[0, 1]).targets(shape) == {0: 0, 1: 0}


@pytest.mark.parametrize(
    ("text", "size"), [("0.02", 20_000), ("0", 0), ("300000", 300_000), ("512KiB", 512 << 10), ("0.5", 500_000)]
)
def test_headroom_is_a_fraction_or_a_size(text: str, size: int) -> None:
    assert ElasticConfig(ep_size=1, max_ep_size=1, headroom=text).headroom_bytes(1_000_000) == size


@pytest.mark.parametrize("text", ["-0.1", "1.5", "nan", "much"])
def test_impossible_headroom_is_refused(text: str) -> None:
    with pytest.raises(UserInputError):
        ElasticConfig(ep_size=1, max_ep_size=1, headroom=text)
