"""How tokens are routed to expert columns: counted by the active ranks, added up over a stretch of time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from elasticmoe_sglang.coordinator.ports import WorkersPort
from elasticmoe_sglang.errors import RoutingUnknown, WorkerError
from elasticmoe_sglang.planner import View

_ANSWER_S = 10.0
LEAST_PER_COLUMN = 800
"""Mean number of routed tokens below which the counts say little. Of small batches one lookup in eight is counted: then
one count of so many is off by a tenth."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Tokens summed over all MoE layers.

    Attributes:
        by_column: routed to each expert column. by_rank: rank -> computed there; of a column with copies each of its
            holders computes a part.
    """

    by_column: tuple[int, ...]
    by_rank: dict[int, int]


async def observe(workers: WorkersPort, view: Callable[[], View], seconds: float) -> Routing:
    """What is routed in so many seconds from now.

    Raises:
        RoutingUnknown: ranks do not count or did not answer, ranks or columns changed meanwhile, or too few tokens were
            routed.
    """
    before = view()
    early = await _read(workers, before.ranks)
    await asyncio.sleep(seconds)
    if view() == before:
        late = await _read(workers, before.ranks)
    if view() != before:
        raise RoutingUnknown(
            "ranks or expert columns changed while the routing was observed",
            epoch=view().epoch,
            hint="Ask again when the change has ended",
        )
    seen = {rank: [now - then for then, now in zip(early[rank], late[rank], strict=True)] for rank in before.ranks}
    counts = tuple(map(sum, zip(*seen.values(), strict=True)))
    wanted = LEAST_PER_COLUMN * len(counts)
    if sum(counts) < wanted:
        raise RoutingUnknown(
            f"{sum(counts)} routed tokens were seen in {seconds:g} s, too few to tell how busy {len(counts)} expert "
            "columns are",
            epoch=before.epoch,
            hint=f"Ask under load, or observe for longer: {wanted} are needed",
        )
    return Routing(by_column=counts, by_rank={rank: sum(tokens) for rank, tokens in seen.items()})


async def _read(workers: WorkersPort, ranks: Sequence[int]) -> Mapping[int, Sequence[int]]:
    try:
        return await asyncio.wait_for(workers.count_routed(ranks), _ANSWER_S)
    except asyncio.TimeoutError as error:
        raise RoutingUnknown(f"a rank did not say within {_ANSWER_S:g} s what was routed to it") from error
    except WorkerError as error:
        raise RoutingUnknown(f"what was routed is not known: {error.what}", rank=error.rank, hint=error.hint) from error
