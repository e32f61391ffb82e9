"""The share of KV cache of each rank: all memory of its device that weights and headroom leave. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_TOKENS = 1024
"""Tokens that a rank keeps at least, enough for a short request. A change that would leave fewer is refused."""
_PARTS = 128
"""Chunks into which a rank's share or its cap is divided: the unused rest is less than 1 %."""
_SMALL, _FEWEST_PARTS = 32, 64
"""But chunks smaller than so many times the granularity are made larger, up to a share's 64th: on devices fetching a
handle costs about a millisecond, whatever its size."""


@dataclass(frozen=True, kw_only=True)
class KvShape:
    """The KV cache of one model, the same on every rank.

    Tokens are laid out one after the other, each with the keys and values of all layers. Pages follow each other from
    page 0 on, which is SGLang's padding page and holds no request's tokens.

    Attributes:
        token_bytes: keys and values of one token over all layers.
        page_tokens: tokens of a page.
        chunk_bytes: unit of allocation and mapping, a multiple of the granularity.
        cap_tokens: upper limit for a rank; None for no limit.
        least_tokens: lower limit for a rank.
    """

    token_bytes: int
    page_tokens: int
    chunk_bytes: int
    cap_tokens: int | None = None
    least_tokens: int = LEAST_TOKENS

    @property
    def page_bytes(self) -> int:
        return self.token_bytes * self.page_tokens

    def tokens(self, chunks: int) -> int:
        """Capacity of `chunks` chunks in tokens: whole pages, without the padding page, up to the cap."""
        held = (chunks * self.chunk_bytes // self.page_bytes - 1) * self.page_tokens
        if self.cap_tokens is not None:
            held = min(held, self.cap_tokens // self.page_tokens * self.page_tokens)
        return max(0, held)

    def chunks(self, tokens: int) -> int:
        """The fewest chunks that hold `tokens` tokens."""
        pages = -(-tokens // self.page_tokens) + 1
        return -(-pages * self.page_bytes // self.chunk_bytes)

    @property
    def least_chunks(self) -> int:
        """Chunks for `least_tokens`."""
        return self.chunks(min(self.least_tokens, self.cap_tokens or self.least_tokens))

    def share(self, room: int, ranks: int) -> int:
        """Chunks of each of `ranks` ranks that share `room` bytes; 0 if `room` is negative."""
        chunks = max(0, room) // self.chunk_bytes // ranks
        return chunks if self.cap_tokens is None else min(chunks, self.chunks(self.cap_tokens))


def kv_shape(
    *,
    token_bytes: int,
    page_tokens: int,
    granularity: int,
    budget: int,
    ranks: int = 1,
    cap_tokens: int | None = None,
) -> KvShape:
    """The shape for devices of `budget` bytes with up to `ranks` ranks each; chunks are a 128th of a rank's share, or
    somewhat larger, so that little memory stays unused and there are few allocations."""
    most = budget // ranks if cap_tokens is None else min(budget // ranks, (cap_tokens + page_tokens) * token_bytes)
    wanted = max(most // _PARTS, min(_SMALL * granularity, most // _FEWEST_PARTS))
    chunk = max(1, wanted // granularity) * granularity
    return KvShape(token_bytes=token_bytes, page_tokens=page_tokens, chunk_bytes=chunk, cap_tokens=cap_tokens)


@dataclass(frozen=True, kw_only=True)
class KvDevice:
    """Memory of one device and how it is used, in bytes.

    Attributes:
        headroom: kept unused.
        weights: dense and column blocks on the device.
        others: neither weights nor KV.
        ranks: the ranks that share the rest.
        held: KV of ranks that are not resized: retiring ranks and hot standbys.
    """

    budget: int
    headroom: int
    weights: int
    others: int
    ranks: Sequence[int]
    held: int = 0

    @property
    def room(self) -> int:
        return self.budget - self.headroom - self.weights - self.others - self.held

    def targets(self, shape: KvShape) -> dict[int, int]:
        """Chunks of each rank."""
        return {rank: shape.share(self.room, len(self.ranks)) for rank in self.ranks}
