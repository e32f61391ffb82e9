"""The CPU platform's paged KV allocator: what a request gets, and that nobody else gets it too."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

pytestmark = pytest.mark.process

PAGE = 4
PAGES = 64


def test_requests_grow_page_by_page_and_share_no_row() -> None:
    """Random admissions, prefills in chunks, decode steps and ends, against a list of rows for each request."""
    from elasticmoe_patches.kv_pools import CpuPagedAllocator

    allocator = CpuPagedAllocator(
        PAGES * PAGE, page_size=PAGE, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False
    )
    rng = random.Random(1)
    rows: list[list[int]] = []
    refused = 0
    for _ in range(300):
        if rows and rng.random() < 0.2:
            allocator.free(torch.tensor(rows.pop(rng.randrange(len(rows)))))
        if len(rows) < 6 and rng.random() < 0.5:
            rows.append([])
        if not rows:
            continue
        before = torch.tensor([len(r) for r in rows])
        last = torch.tensor([r[-1] if r else -1 for r in rows])
        if rng.random() < 0.5 and all(rows):
            after = before + 1
            got = allocator.alloc_decode(after, after, last)
        else:
            after = before + torch.tensor([rng.randrange(1, 10) for _ in rows])
            got = allocator.alloc_extend(before, before, after, after, last, int((after - before).sum()))
        if got is None:
            wanted = int(((after + PAGE - 1) // PAGE - (before + PAGE - 1) // PAGE).sum())
            assert allocator.available_size() < wanted * PAGE, "there was room"
            refused += 1
            continue
        for request, new in zip(rows, got.split((after - before).tolist()), strict=True):
            request.extend(new.tolist())
        check(rows, allocator.available_size())
    assert refused > 0, "the pool was never full"


def check(rows: list[list[int]], free: int) -> None:
    for request in rows:
        assert all(row % PAGE == position % PAGE for position, row in enumerate(request)), "aligned to its page"
        assert all(b == a + 1 for a, b in itertools.pairwise(request) if b % PAGE), "whole within a page"
    pages = [row // PAGE for request in rows for row in request[::PAGE]]
    assert len(set(pages)) == len(pages) and 0 not in pages, "no page twice, and not the one for padding"
    assert free == (PAGES - len(pages)) * PAGE
