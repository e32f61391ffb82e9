"""KV pools over HMM memory, and the pools and slot allocators of the CPU platform.

The elastic pools are SGLang's over the rank's KV space: tensors that cover all reserved addresses, of which only the
rows below ``size + page_size`` are mapped. SGLang indexes rows it got from the allocator, and row 0.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator, alloc_extend_naive
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, _set_kv_buffer_impl
from sglang.srt.runtime_context import get_schedule
from sglang.srt.utils import get_num_new_pages

from elasticmoe_patches.worker.worker import current_worker
from elasticmoe_sglang.worker.kv import WorkerKv


class CpuMLATokenToKVPool(MLATokenToKVPool):  # type: ignore[misc]
    """SGLang's latent pool, [rows, 1, kv_lora_rank + qk_rope_head_dim] a layer.

    SGLang 0.5.21 hands every out-of-tree MLA pool an ``index_head_dim``, None unless the model has a sparse-attention
    indexer, but its own pool does not take the argument.
    """

    def __init__(self, *args: Any, index_head_dim: int | None = None, **kwargs: Any) -> None:
        assert index_head_dim is None, "models with a sparse-attention indexer are built with get_dsa_kv_pool_cls"
        super().__init__(*args, **kwargs)


def _kv() -> WorkerKv:
    kv = current_worker().kv
    assert kv is not None, "the KV cache is opened before its pool is made"
    return kv


def held_bytes() -> int:
    """Of the memory that is mapped now."""
    return _kv().chunks * _kv().shape.chunk_bytes


def space_views() -> dict[str, torch.Tensor]:
    """The tensors of the rank's KV cache, over all reserved addresses."""
    return _kv().space.views()


class ElasticMHATokenToKVPool(MHATokenToKVPool):  # type: ignore[misc]
    """Keys and values of a token lie side by side, layer after layer: strided views, see ``KvSpace``."""

    def _create_buffers_normal(self) -> None:
        assert self.kv_cache_layout == "nhd", f"the elastic KV pool does not know the layout {self.kv_cache_layout}"
        views = space_views()
        self.k_buffer = [views[f"{layer}.k"] for layer in range(self.layer_num)]
        self.v_buffer = [views[f"{layer}.v"] for layer in range(self.layer_num)]

    def _build_kv_buffer_descs(self) -> list[Any]:
        """0.5.23 describes the buffers for PD disaggregation and for backing them after graph capture. Neither is
        served from this pool, whose buffers reach over all reserved addresses and so have more rows than it checks."""
        return []

    def _init_data_ptrs_and_strides(self) -> None:
        super()._init_data_ptrs_and_strides()
        strides = [buffer.stride(0) * buffer.itemsize for buffer in self._slot_move_pointer_buffers()]
        self.data_strides = torch.tensor(strides, device=self.device)

    def _store_kv_layer(self, layer_idx: int, loc: torch.Tensor, cache_k: torch.Tensor, cache_v: torch.Tensor) -> None:
        """As SGLang's, but with every reserved row allowed: a captured graph keeps the limit it was captured with, and
        the capacity grows later."""
        k_rows, v_rows = self.k_buffer[layer_idx], self.v_buffer[layer_idx]
        _set_kv_buffer_impl(
            cache_k,
            cache_v,
            k_rows,
            v_rows,
            loc,
            row_dim=self.row_dim,
            store_dtype=self.store_dtype,
            device_module=self.device_module,
            size_limit=k_rows.shape[0],
            alt_stream=self.alt_stream,
            v_row_dim=self.v_row_dim,
        )

    def get_kv_size_bytes(self) -> tuple[int, int]:
        return held_bytes() // 2, held_bytes() // 2


class ElasticMLATokenToKVPool(CpuMLATokenToKVPool):
    """The latents of a token lie side by side, layer after layer: strided views, see ``KvSpace``."""

    def _create_buffers(self) -> None:
        views = space_views()
        self.kv_buffer = [views[f"{layer}.kv"] for layer in range(self.layer_num)]

    def get_kv_size_bytes(self) -> int:
        return held_bytes()


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
