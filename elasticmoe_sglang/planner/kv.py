"""How much KV cache each rank has: all of a device's memory that neither weights nor headroom take. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_TOKENS = 1024
"""What a rank keeps at least: room for a short request. A change that would leave less is refused."""
_PARTS = 128
"""Chunks that a rank's share or its cap is divided into: what does not fill a chunk stays unused, less than 1 %."""


@dataclass(frozen=True, kw_only=True)
class KvShape:
    """The KV cache of one model, the same on every rank.

    Tokens are laid out one after the other, each with the keys and values of all layers. Pages follow each other from
    page 0 on, which is SGLang's padding page and holds nobody's tokens.

    Attributes:
        token_bytes: keys and values of one token over all layers.
        page_tokens: tokens of a page.
        chunk_bytes: what is allocated and mapped at a time, a multiple of the granularity.
        cap_tokens: the most a rank shall have, whatever room there is; None for no cap.
        least_tokens: what a rank cannot do without.
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
        """Tokens that so many chunks hold, in whole pages, the padding page and what is beyond the cap left out."""
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
        """Chunks for the least tokens."""
        return self.chunks(min(self.least_tokens, self.cap_tokens or self.least_tokens))

    def share(self, room: int, ranks: int) -> int:
        """Chunks of each of `ranks` ranks that share `room` bytes; never negative."""
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
    """The shape for devices of `budget` bytes with up to `ranks` ranks each: chunks small enough to fill them, large
    enough to be few."""
    most = budget // ranks if cap_tokens is None else min(budget // ranks, (cap_tokens + page_tokens) * token_bytes)
    chunk = max(1, most // _PARTS // granularity) * granularity
    return KvShape(token_bytes=token_bytes, page_tokens=page_tokens, chunk_bytes=chunk, cap_tokens=cap_tokens)


@dataclass(frozen=True, kw_only=True)
class KvDevice:
    """One device as KV caches see it, in bytes and ranks.

    Attributes:
        headroom: what is left unused on purpose.
        weights: dense and column blocks that lie on it at the moment in question.
        others: everything else that is neither weights nor KV.
        ranks: the ranks that share what is left.
        held: KV of ranks that keep what they have (retiring ranks).
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
