"""KV slot allocators of the CPU platform (mirrors ``sglang/srt/mem_cache/allocator``)."""

from __future__ import annotations

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.runtime_context import get_schedule
from sglang.srt.utils import get_num_new_pages


class CpuTokenAllocator(TokenToKVPoolAllocator):  # type: ignore[misc]
    """Page size 1. Takes the keyword arguments that SGLang hands to an out-of-tree allocator."""

    def __init__(
        self, size: int, *, page_size: int, dtype: torch.dtype, device: str, kvcache: object, need_sort: bool
    ) -> None:
        assert page_size == 1
        super().__init__(size, dtype, device, kvcache, need_sort)


class CpuPagedAllocator(PagedTokenToKVPoolAllocator):  # type: ignore[misc]
    """Page size > 1, with SGLang's PyTorch formulation of its two Triton kernels."""

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        if num_new_pages is None:
            num_new_pages = get_num_new_pages(
                seq_lens=seq_lens_cpu, page_size=self.page_size, prefix_lens=prefix_lens_cpu
            )
        return self._extend(prefix_lens, seq_lens, last_loc, extend_num_tokens, num_new_pages)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        num_new_pages = get_num_new_pages(seq_lens=seq_lens_cpu, page_size=self.page_size, decode=True)
        return self._extend(seq_lens - 1, seq_lens, last_loc, len(seq_lens), num_new_pages)

    def _extend(
        self, prefix_lens: torch.Tensor, seq_lens: torch.Tensor, last_loc: torch.Tensor, tokens: int, new_pages: int
    ) -> torch.Tensor | None:
        if new_pages > len(self.free_pages):
            self.merge_and_sort_free()
        if new_pages > len(self.free_pages):
            return None
        out = torch.empty((tokens,), dtype=torch.int64, device=self.device)
        alloc_extend_naive(prefix_lens, seq_lens, last_loc, self.free_pages, out, self.page_size, self.device)
        self.free_pages = self.free_pages[new_pages:]
        return out


def allocator_class() -> type:
    """The allocator for the page size that this server runs with."""
    return CpuTokenAllocator if get_schedule().page_size == 1 else CpuPagedAllocator
