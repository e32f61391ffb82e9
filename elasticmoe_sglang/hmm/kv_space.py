"""Address space of KV caches: a rank's own, which grows and shrinks at its end, and windows into a retiring rank's.

Tokens lie one after the other, each with the keys and values of all its layers. So one chunk of memory holds whole
tokens of the whole model (one handle, one map call), and a request's page is one piece wherever it is copied. The
tensors of a layer are strided views. Chunk boundaries need not fall between tokens: a token may be used when
everything before its end is mapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from elasticmoe_sglang.errors import VmmError
from elasticmoe_sglang.hmm.layout import ITEM_BYTES, KvLayout
from elasticmoe_sglang.hmm.vmm.base import VmmBackend, VmmHandle
from elasticmoe_sglang.hmm.vmm.tensors import MappedRange, contiguous_strides, tensor_in

if TYPE_CHECKING:
    import torch

_WORD = 8


class KvSpace:
    """A rank's KV cache: chunks 0 to `chunks` - 1 are mapped, and nothing behind them.

    Args:
        layout: of one token.
        chunk_bytes: of every handle mapped here.
        max_chunks: how many to reserve addresses for; they never move.

    Attributes:
        max_tokens: tokens that fit into all of it.
    """

    def __init__(
        self, backend: VmmBackend, layout: KvLayout, *, chunk_bytes: int, max_chunks: int, device: int = 0
    ) -> None:
        self.backend = backend
        self.layout = layout
        self.chunk_bytes = chunk_bytes
        self.max_chunks = max_chunks
        self.device = device
        self.max_tokens = max_chunks * chunk_bytes // layout.token_bytes
        self.chunks = 0
        self._range = MappedRange(backend, max_chunks * chunk_bytes)

    def map_chunk(self, handle: VmmHandle) -> None:
        """Puts the next chunk at the end. Closes the handle, whatever happens: the mapping keeps the memory."""
        try:
            if handle.nbytes != self.chunk_bytes:
                raise VmmError(f"a chunk of {handle.nbytes} bytes does not fit where {self.chunk_bytes} are expected")
            if self.chunks >= self.max_chunks:
                raise VmmError(f"all {self.max_chunks} chunks are mapped")
            self._range.map(self.chunks * self.chunk_bytes, handle)
            self.chunks += 1
        finally:
            self.backend.close(handle)

    def unmap_chunk(self) -> None:
        """Takes the last chunk away. Nothing may read it any more; its lease goes back to the HMM."""
        if not self.chunks:
            raise VmmError("no chunk is mapped")
        self._range.unmap((self.chunks - 1) * self.chunk_bytes)
        self.chunks -= 1

    def views(self) -> dict[str, torch.Tensor]:
        """For each tensor of the layout all tokens of it: [max_tokens, *shape]. Only mapped tokens may be touched."""
        storage = self._range.storage(self.device)
        views = {}
        for spec in self.layout.specs:
            strides = [self.layout.token_bytes // ITEM_BYTES[spec.dtype], *contiguous_strides(spec.shape)]
            shape = (self.max_tokens, *spec.shape)
            views[spec.name] = tensor_in(storage, self.layout.offsets[spec.name], shape, spec.dtype, strides)
        return views

    def rows(self) -> torch.Tensor:
        """All tokens as they lie: int64 [max_tokens, words of a token]. Only mapped ones may be touched."""
        return _rows(self._range, self.max_tokens, self.layout.token_bytes, self.device)

    def close(self) -> None:
        """Unmaps all of it once no tensor over it is left. Idempotent."""
        self._range.close()


class KvWindow:
    """Some chunks of another rank's KV cache, at the places they have there.

    Args:
        handles: chunk -> its memory; all are closed, whatever happens.
    """

    def __init__(
        self,
        backend: VmmBackend,
        handles: Mapping[int, VmmHandle],
        *,
        token_bytes: int,
        chunk_bytes: int,
        device: int = 0,
    ) -> None:
        self._token_bytes = token_bytes
        self._device = device
        self._tokens = (max(handles) + 1) * chunk_bytes // token_bytes
        left = dict(handles)
        try:
            self._range = MappedRange(backend, (max(handles) + 1) * chunk_bytes)
            try:
                for chunk, handle in handles.items():
                    self._range.map(chunk * chunk_bytes, handle)
                    backend.close(left.pop(chunk))
            except BaseException:
                self._range.close()
                raise
        finally:
            for handle in left.values():
                backend.close(handle)

    def rows(self) -> torch.Tensor:
        """Its tokens as they lie: int64 [tokens, words of a token]. Only those in the chunks may be touched."""
        return _rows(self._range, self._tokens, self._token_bytes, self._device)

    def close(self) -> None:
        """Unmaps all of it once no tensor over it is left. Idempotent."""
        self._range.close()


def _rows(mapped: MappedRange, tokens: int, token_bytes: int, device: int) -> torch.Tensor:
    return tensor_in(mapped.storage(device), 0, (tokens, token_bytes // _WORD), "int64")
