"""How tokens are routed to expert columns: counted by the active ranks, added up over a stretch of time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from elasticmoe_sglang.coordinator.ports import WorkersPort
from elasticmoe_sglang.errors import RoutingUnknown, WorkerError
from elasticmoe_sglang.planner import View

_ANSWER_S = 10.0
LEAST_PER_COLUMN = 800
"""Mean number of routed tokens below which the counts say little. Of small batches one lookup in eight is counted: then
one count of so many is off by a tenth."""


async def observe(workers: WorkersPort, view: Callable[[], View], seconds: float) -> tuple[int, ...]:
    """Tokens routed to each expert column in so many seconds from now, summed over all MoE layers.

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
    counts = tuple(after - then for then, after in zip(early, late, strict=True))
    wanted = LEAST_PER_COLUMN * len(counts)
    if sum(counts) < wanted:
        raise RoutingUnknown(
            f"{sum(counts)} routed tokens were seen in {seconds:g} s, too few to tell how busy {len(counts)} expert "
            "columns are",
            epoch=before.epoch,
            hint=f"Ask under load, or observe for longer: {wanted} are needed",
        )
    return counts


async def _read(workers: WorkersPort, ranks: Sequence[int]) -> Sequence[int]:
    try:
        return await asyncio.wait_for(workers.count_routed(ranks), _ANSWER_S)
    except asyncio.TimeoutError as error:
        raise RoutingUnknown(f"a rank did not say within {_ANSWER_S:g} s what was routed to it") from error
    except WorkerError as error:
        raise RoutingUnknown(f"what was routed is not known: {error.what}", rank=error.rank, hint=error.hint) from error
