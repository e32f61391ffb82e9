"""KV with a range of addresses for each layer's keys and values, as on NPUs, in a real HMM."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticmoe_sglang.errors import BudgetExceeded, VmmError, WorkerError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.kv_space import KvSpace, pieces_of
from elasticmoe_sglang.hmm.layout import KvPlanes
from elasticmoe_sglang.hmm.process import HmmProcess
from elasticmoe_sglang.hmm.vmm.cpu import CpuBackend
from elasticmoe_sglang.planner import KvShape
from elasticmoe_sglang.worker.kv import Resized, WorkerKv, chunks_of, copy_stretches

PAGE = 4096
LAYERS, TOKENS_A_CHUNK = 3, 256
# As MLA's: latents four times as wide as rotated keys.
LAYOUT = KvPlanes.of(
    (f"{layer}.{part}", (1, width), torch.float32) for layer in range(LAYERS) for part, width in (("k", 16), ("v", 4))
)
CHUNK = TOKENS_A_CHUNK * LAYOUT.token_bytes
SHAPE = KvShape(token_bytes=LAYOUT.token_bytes, page_tokens=16, chunk_bytes=CHUNK, least_tokens=16)
BUDGET = 8 * CHUNK
WAIT_S = 20.0


@pytest.fixture
def budgets() -> list[int]:
    return [BUDGET] * 2


@pytest.fixture
def kvs(hmm: HmmProcess) -> Iterator[list[WorkerKv]]:
    """Of ranks 0 and 1, each on a device of its own."""
    clients = [HmmClient(hmm.endpoint, name=f"rank-{rank}") for rank in range(2)]
    yield [
        WorkerKv(client, rank=rank, device=rank, shape=SHAPE, layout=LAYOUT, max_chunks=16)
        for rank, client in enumerate(clients)
    ]
    for client in clients:
        client.close()


def resize(kv: WorkerKv, chunks: int) -> None:
    kv.resize_idle(chunks, None, lambda tokens: Resized(tokens=tokens))


def used(kv: WorkerKv) -> int:
    return kv._client.status().devices[kv._device].by_kind.get("kv", 0)


def fill(kv: WorkerKv, seed: int) -> list[torch.Tensor]:
    random_numbers = torch.Generator().manual_seed(seed)
    tokens = kv.chunks * TOKENS_A_CHUNK
    contents = [torch.randint(1 << 60, (tokens, rows.shape[1]), generator=random_numbers) for rows in kv.rows]
    for rows, content in zip(kv.rows, contents, strict=True):
        rows[:tokens] = content
    return contents


def same(kv: WorkerKv, contents: list[torch.Tensor], tokens: int) -> bool:
    pairs = zip(kv.rows, contents, strict=True)
    return all(torch.equal(rows[:tokens], content[:tokens]) for rows, content in pairs)


@pytest.mark.parametrize("granularity", [4096, 65536, 2 << 20])
def test_a_chunk_is_whole_tokens_and_whole_pieces(granularity: int) -> None:
    unit = LAYOUT.chunk_unit(granularity)
    assert unit % LAYOUT.token_bytes == 0
    pieces = pieces_of(LAYOUT, unit)
    assert sum(pieces) == unit and all(piece and piece % granularity == 0 for piece in pieces)
    assert len({piece // size for piece, size in zip(pieces, LAYOUT.piece_bytes, strict=True)}) == 1
    assert min(pieces) == granularity, "no smaller one would do"


def test_a_layers_tensor_has_no_gaps(kvs: list[WorkerKv]) -> None:
    kv = kvs[0]
    kv.open(2, None, WAIT_S)
    contents = fill(kv, 1)
    views = kv.space.views()
    for number, spec in enumerate(LAYOUT.specs):
        view = views[spec.name][: 2 * TOKENS_A_CHUNK]
        assert view.is_contiguous() and view.shape[1:] == spec.shape
        assert torch.equal(view.flatten(1).view(torch.int64), contents[number])


def test_capacity_follows_the_chunks_and_what_stays_is_not_touched(kvs: list[WorkerKv]) -> None:
    kv = kvs[0]
    kv.open(3, None, WAIT_S)
    contents = fill(kv, 2)
    kept = 3
    for chunks in (5, 2, 7, 1, 4):
        resize(kv, chunks)
        kept = min(kept, chunks)
        assert (kv.chunks, used(kv)) == (chunks, chunks * CHUNK)
        assert same(kv, contents, kept * TOKENS_A_CHUNK)


def test_what_does_not_fit_leaves_nothing_behind(kvs: list[WorkerKv]) -> None:
    """Keys of the last chunks are allocated before there is no room for its values."""
    kv = kvs[0]
    kv.open(7, None, WAIT_S)
    with pytest.raises(BudgetExceeded):
        kv._add(2, None)
    assert (kv.chunks, used(kv)) == (7, 7 * CHUNK)
    resize(kv, 8)
    assert used(kv) == BUDGET


def test_pages_are_copied_out_of_a_retiring_ranks_memory(kvs: list[WorkerKv]) -> None:
    retiring, survivor = kvs
    retiring.open(4, None, WAIT_S)
    survivor.open(2, None, WAIT_S)
    contents, before = fill(retiring, 3), fill(survivor, 4)
    pages = [17, 18, 3, 60]
    window = survivor.window(0, chunks_of(pages, SHAPE))
    there = torch.tensor([page * 16 + token for page in pages for token in range(16)])
    here = torch.arange(100, 100 + len(there))
    copy_stretches(survivor.rows, here, window.rows(), there)
    for content, expected in zip(contents, before, strict=True):
        expected[here] = content[there]
    assert same(survivor, before, 2 * TOKENS_A_CHUNK)
    window.close()
    retiring._remove(4)
    with pytest.raises(WorkerError, match="gone"):
        survivor.window(0, [0])


@given(st.permutations(range(40)), st.integers(1, 40))
def test_stretches_copy_what_an_index_copies(order: list[int], count: int) -> None:
    rng = random.Random(count)
    source = [torch.randint(1 << 40, (40, width)) for width in (2, 5)]
    targets = sorted(rng.sample(range(40), count)) if count % 2 else order[-count:]
    target = [torch.zeros(40, width, dtype=torch.int64) for width in (2, 5)]
    copy_stretches(target, torch.tensor(targets), source, torch.tensor(order[:count]))
    for there, here in zip(target, source, strict=True):
        expected = torch.zeros_like(there).index_copy_(0, torch.tensor(targets), here[order[:count]])
        assert torch.equal(there, expected)


def test_a_piece_that_cannot_be_mapped_undoes_the_others() -> None:
    backend = CpuBackend()
    space = KvSpace(backend, LAYOUT, chunk_bytes=CHUNK, max_chunks=1)
    pieces = pieces_of(LAYOUT, CHUNK)
    with pytest.raises(VmmError):
        space.map_chunk(*(backend.create(size, 0) for size in pieces[:-1]))
    space.map_chunk(*(backend.create(size, 0) for size in pieces))
    with pytest.raises(VmmError, match="are mapped"):
        space.map_chunk(*(backend.create(size, 0) for size in pieces))
    space.unmap_chunk()
    assert space.chunks == 0
    space.close()
