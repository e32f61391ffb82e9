"""Address space of KV caches: a rank's own, which grows and shrinks at its end, and windows into a retiring rank's.

By `KvLayout` tokens lie one after the other, each with the keys and values of all its layers. So one chunk of memory
holds whole tokens of the whole model (one handle, one map call), and a request's page is one piece wherever it is
copied. The tensors of a layer are strided views. Chunk boundaries need not fall between tokens: a token may be used
when everything before its end is mapped. By `KvPlanes` each tensor has addresses of its own; a chunk is a handle in
each, for the same whole tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from elasticmoe_sglang.errors import VmmError
from elasticmoe_sglang.hmm.layout import ITEM_BYTES, KvLayout
from elasticmoe_sglang.hmm.vmm.base import VmmBackend, VmmHandle
from elasticmoe_sglang.hmm.vmm.tensors import MappedRange, contiguous_strides, tensor_in

if TYPE_CHECKING:
    import torch

_WORD = 8


def pieces_of(layout: KvLayout, chunk_bytes: int) -> tuple[int, ...]:
    """Bytes of each piece of memory that makes a chunk."""
    return tuple(chunk_bytes * size // layout.token_bytes for size in layout.piece_bytes)


class KvSpace:
    """A rank's KV cache: chunks 0 to `chunks` - 1 are mapped, and nothing behind them.

    Args:
        layout: of one token.
        chunk_bytes: of every chunk mapped here.
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
        self._pieces = pieces_of(layout, chunk_bytes)
        self._ranges = [MappedRange(backend, max_chunks * piece) for piece in self._pieces]

    def map_chunk(self, *handles: VmmHandle) -> None:
        """Puts the next chunk at the end, a handle for each piece; all or none. Closes the handles, whatever happens:
        the mappings keep the memory."""
        try:
            found = tuple(handle.nbytes for handle in handles)
            if found != self._pieces:
                raise VmmError(f"a chunk of {found} bytes does not fit where {self._pieces} are expected")
            if self.chunks >= self.max_chunks:
                raise VmmError(f"all {self.max_chunks} chunks are mapped")
            _map_all(self._ranges, self._pieces, self.chunks, handles)
            self.chunks += 1
        finally:
            for handle in handles:
                self.backend.close(handle)

    def unmap_chunk(self) -> None:
        """Takes the last chunk away. Nothing may read it any more; its lease goes back to the HMM."""
        if not self.chunks:
            raise VmmError("no chunk is mapped")
        for mapped, piece in zip(self._ranges, self._pieces, strict=True):
            mapped.unmap((self.chunks - 1) * piece)
        self.chunks -= 1

    def views(self) -> dict[str, torch.Tensor]:
        """For each tensor of the layout all tokens of it: [max_tokens, *shape]. Only mapped tokens may be touched."""
        storages = [mapped.storage(self.device) for mapped in self._ranges]
        views = {}
        for spec in self.layout.specs:
            number, offset = self.layout.place(spec.name)
            token_items = self.layout.piece_bytes[number] // ITEM_BYTES[spec.dtype]
            strides = [token_items, *contiguous_strides(spec.shape)]
            views[spec.name] = tensor_in(storages[number], offset, (self.max_tokens, *spec.shape), spec.dtype, strides)
        return views

    def rows(self) -> tuple[torch.Tensor, ...]:
        """All tokens as they lie, of each range: int64 [max_tokens, words of a token]. Only mapped ones may be
        touched."""
        return _rows(self._ranges, self.layout, self.max_tokens, self.device)

    def close(self) -> None:
        """Unmaps all of it once no tensor over it is left. Idempotent."""
        for mapped in self._ranges:
            mapped.close()


class KvWindow:
    """Some chunks of another rank's KV cache, at the places they have there.

    Args:
        handles: chunk -> its memory, a handle for each piece; all are closed, whatever happens.
    """

    def __init__(
        self,
        backend: VmmBackend,
        handles: Mapping[int, Sequence[VmmHandle]],
        layout: KvLayout,
        *,
        chunk_bytes: int,
        device: int = 0,
    ) -> None:
        self._layout = layout
        self._device = device
        self._tokens = (max(handles) + 1) * chunk_bytes // layout.token_bytes
        self._ranges: list[MappedRange] = []
        pieces = pieces_of(layout, chunk_bytes)
        try:
            for piece in pieces:
                self._ranges.append(MappedRange(backend, (max(handles) + 1) * piece))
            for chunk, its in handles.items():
                _map_all(self._ranges, pieces, chunk, its)
        except BaseException:
            self.close()
            raise
        finally:
            for handle in (each for its in handles.values() for each in its):
                backend.close(handle)

    def rows(self) -> tuple[torch.Tensor, ...]:
        """Its tokens as they lie, of each range: int64 [tokens, words of a token]. Only those in the chunks may be
        touched."""
        return _rows(self._ranges, self._layout, self._tokens, self._device)

    def close(self) -> None:
        """Unmaps all of it once no tensor over it is left. Idempotent."""
        for mapped in self._ranges:
            mapped.close()


def _map_all(ranges: Sequence[MappedRange], pieces: Sequence[int], chunk: int, handles: Iterable[VmmHandle]) -> None:
    """All pieces of a chunk, or none."""
    done: list[tuple[MappedRange, int]] = []
    try:
        for mapped, piece, handle in zip(ranges, pieces, handles, strict=True):
            mapped.map(chunk * piece, handle)
            done.append((mapped, chunk * piece))
    except BaseException:
        for mapped, offset in done:
            mapped.unmap(offset)
        raise


def _rows(ranges: Sequence[MappedRange], layout: KvLayout, tokens: int, device: int) -> tuple[torch.Tensor, ...]:
    sizes = layout.piece_bytes
    return tuple(
        tensor_in(mapped.storage(device), 0, (tokens, size // _WORD), "int64")
        for mapped, size in zip(ranges, sizes, strict=True)
    )
