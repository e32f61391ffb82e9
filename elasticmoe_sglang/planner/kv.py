"""How much KV cache each seat has: all of a device's memory that neither weights nor headroom take. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LEAST_TOKENS = 1024
"""What a seat keeps at least: room for a short request. A change that would leave less is refused."""
_PARTS = 128
"""Chunks that a seat's share or its cap is divided into: what does not fill a chunk stays unused, less than 1 %."""


@dataclass(frozen=True, kw_only=True)
class KvShape:
    """The KV cache of one model, the same on every seat.

    Tokens are laid out one after the other, each with the keys and values of all layers. Pages follow each other from
    page 0 on, which is SGLang's padding page and holds nobody's tokens.

    Attributes:
        token_bytes: keys and values of one token over all layers.
        page_tokens: tokens of a page.
        chunk_bytes: what is allocated and mapped at a time, a multiple of the granularity.
        cap_tokens: the most a seat shall have, whatever room there is; None for no cap.
        least_tokens: what a seat cannot do without.
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

    def share(self, room: int, seats: int) -> int:
        """Chunks of each of `seats` seats that share `room` bytes; never negative."""
        chunks = max(0, room) // self.chunk_bytes // seats
        return chunks if self.cap_tokens is None else min(chunks, self.chunks(self.cap_tokens))


def kv_shape(
    *,
    token_bytes: int,
    page_tokens: int,
    granularity: int,
    budget: int,
    seats: int = 1,
    cap_tokens: int | None = None,
) -> KvShape:
    """The shape for devices of `budget` bytes with up to `seats` seats each: chunks small enough to fill them, large
    enough to be few."""
    most = budget // seats if cap_tokens is None else min(budget // seats, (cap_tokens + page_tokens) * token_bytes)
    chunk = max(1, most // _PARTS // granularity) * granularity
    return KvShape(token_bytes=token_bytes, page_tokens=page_tokens, chunk_bytes=chunk, cap_tokens=cap_tokens)


@dataclass(frozen=True, kw_only=True)
class KvDevice:
    """One device as KV caches see it, in bytes and seats.

    Attributes:
        headroom: what is left unused on purpose.
        weights: dense and column blocks that lie on it at the moment in question.
        others: everything else that is neither weights nor KV.
        seats: the seats that share what is left.
        held: KV of seats that keep what they have (leavers).
    """

    budget: int
    headroom: int
    weights: int
    others: int
    seats: Sequence[int]
    held: int = 0

    @property
    def room(self) -> int:
        return self.budget - self.headroom - self.weights - self.others - self.held

    def targets(self, shape: KvShape) -> dict[int, int]:
        """Chunks of each seat."""
        return {seat: shape.share(self.room, len(self.seats)) for seat in self.seats}
