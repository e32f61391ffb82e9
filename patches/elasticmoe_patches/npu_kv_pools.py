"""SGLang's KV pools on NPUs, over HMM memory: a range of addresses for each layer's keys and values, see ``KvPlanes``.

Their tensors end with the rows that are mapped, because operators are given a whole buffer; they are made anew, at the
same addresses, when the capacity changes. That is when somebody sets `size`.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.hardware_backend.npu.memory_pool_npu import NPUMHATokenToKVPool, NPUMLATokenToKVPool

from elasticmoe_patches.kv_pools import held_bytes, space_views


class _Mapped:
    """What both pools do: buffers over the rows that are mapped, in the pool's shape."""

    page_size: int
    layer_num: int
    _size = 0
    _views: dict[str, torch.Tensor] | None = None

    @property
    def size(self) -> int:
        return self._size

    @size.setter
    def size(self, tokens: int) -> None:
        self._size = tokens
        if self._views is not None:
            self._show()

    def elastic_kv_open(self) -> None:
        self._views = space_views()
        self._show()

    def _show(self) -> None:
        self.k_buffer, self.v_buffer = self._buffers("k"), self._buffers("v")

    def _buffers(self, name: str) -> list[torch.Tensor]:
        assert self._views is not None
        rows = (self._size // self.page_size + 1) * self.page_size  # page 0 is padding
        return [self.elastic_kv_shape(self._views[f"{layer}.{name}"][:rows]) for layer in range(self.layer_num)]

    def elastic_kv_shape(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.view(-1, self.page_size, *rows.shape[1:])


class ElasticNpuMhaPool(_Mapped, NPUMHATokenToKVPool):  # type: ignore[misc]
    """[pages, page size, heads, width] a layer; with fused attention [rows, 1, heads, width], as SGLang's."""

    def _create_buffers(self) -> None:
        self.elastic_kv_open()

    def elastic_kv_shape(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.unsqueeze(1) if self.use_fia else super().elastic_kv_shape(rows)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        return held_bytes() // 2, held_bytes() // 2


class ElasticNpuMlaPool(_Mapped, NPUMLATokenToKVPool):  # type: ignore[misc]
    """[pages, page size, 1, width] a layer, of the latent and of the rotated keys."""

    def __init__(self, size: int, **kwargs: Any) -> None:
        super().__init__(0, **kwargs)  # SGLang makes buffers in the constructor: of one page here
        self._size = size
        self.elastic_kv_open()

    def get_kv_size_bytes(self) -> int:
        return held_bytes()
