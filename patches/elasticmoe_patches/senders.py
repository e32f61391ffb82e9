"""Which process sent an output: its rank and incarnation, and the ones whose outputs count no more.

A worker's tokens travel through the detokenizer and may still be on their way when it is dead and its requests have
been sent to other ranks. There they would be doubled, or mixed with another continuation. The field in which SGLang
names the rank of an output carries the incarnation too; the tokenizer takes it out again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from elasticmoe_sglang.comm.membership import MAX_CAPACITY

Sender = tuple[int, int]
"""(rank, incarnation); see `JoinSpec.incarnation`."""


def tag(rank: int, incarnation: int) -> int:
    """Both as one number."""
    return rank + MAX_CAPACITY * incarnation


class Senders:
    """In the tokenizer's event loop."""

    def __init__(self) -> None:
        self._gone: set[Sender] = set()

    def bar(self, gone: Iterable[Sender]) -> None:
        """Outputs of these processes do not count from now on: their requests are sent to others."""
        self._gone.update(gone)

    def admit(self, output: Any) -> bool:
        """Take the incarnation out of an output (SGLang's batch of one rank). Whether it counts."""
        tags = getattr(output, "dp_ranks", None)
        if not tags:
            return True
        incarnation, rank = divmod(tags[0], MAX_CAPACITY)
        output.dp_ranks = [rank] * len(tags)
        return (rank, incarnation) not in self._gone
