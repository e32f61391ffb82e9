"""KV pools of the CPU platform (mirrors ``sglang/srt/mem_cache/memory_pool.py``).

The elastic ones are SGLang's pools over the rank's KV space: tensors that reach over all addresses reserved, of which
only the rows below ``size + page_size`` are mapped. SGLang indexes rows it got from the allocator, and row 0.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

from elasticmoe_sglang.worker.kv import WorkerKv


class CpuMLATokenToKVPool(MLATokenToKVPool):  # type: ignore[misc]
    """SGLang's latent pool, [rows, 1, kv_lora_rank + qk_rope_head_dim] a layer.

    SGLang hands every out-of-tree MLA pool an ``index_head_dim``, None unless the model has a sparse-attention
    indexer, but its own pool does not take the argument.
    """

    def __init__(self, *args: Any, index_head_dim: int | None = None, **kwargs: Any) -> None:
        assert index_head_dim is None, "models with a sparse-attention indexer are built with get_dsa_kv_pool_cls"
        super().__init__(*args, **kwargs)


def _kv() -> WorkerKv:
    from elasticmoe_patches.worker.worker import current_worker

    kv = current_worker().kv
    assert kv is not None, "the KV cache is opened before its pool is made"
    return kv


def _mapped_bytes() -> int:
    return _kv().chunks * _kv().shape.chunk_bytes


class ElasticMHATokenToKVPool(MHATokenToKVPool):  # type: ignore[misc]
    """Keys and values of a token lie side by side, layer after layer: strided views, see ``KvSpace``."""

    def _create_buffers_normal(self) -> None:
        assert self.kv_cache_layout == "nhd", f"the elastic KV pool does not know the layout {self.kv_cache_layout}"
        views = _kv().space.views()
        self.k_buffer = [views[f"{layer}.k"] for layer in range(self.layer_num)]
        self.v_buffer = [views[f"{layer}.v"] for layer in range(self.layer_num)]

    def _init_data_ptrs_and_strides(self) -> None:
        super()._init_data_ptrs_and_strides()
        strides = [buffer.stride(0) * buffer.itemsize for buffer in self._slot_move_pointer_buffers()]
        self.data_strides = torch.tensor(strides, device=self.device)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        return _mapped_bytes() // 2, _mapped_bytes() // 2


class ElasticMLATokenToKVPool(CpuMLATokenToKVPool):
    """The latents of a token lie side by side, layer after layer: strided views, see ``KvSpace``."""

    def _create_buffers(self) -> None:
        views = _kv().space.views()
        self.kv_buffer = [views[f"{layer}.kv"] for layer in range(self.layer_num)]

    def get_kv_size_bytes(self) -> int:
        return _mapped_bytes()
