"""KV pools of the CPU platform (mirrors ``sglang/srt/mem_cache/memory_pool.py``)."""

from __future__ import annotations

from typing import Any

from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool


class CpuMLATokenToKVPool(MLATokenToKVPool):  # type: ignore[misc]
    """SGLang's latent pool, [rows, 1, kv_lora_rank + qk_rope_head_dim] a layer.

    SGLang hands every out-of-tree MLA pool an ``index_head_dim``, None unless the model has a sparse-attention
    indexer, but its own pool does not take the argument.
    """

    def __init__(self, *args: Any, index_head_dim: int | None = None, **kwargs: Any) -> None:
        assert index_head_dim is None, "models with a sparse-attention indexer are built with get_dsa_kv_pool_cls"
        super().__init__(*args, **kwargs)
