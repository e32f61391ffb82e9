"""Who is where: retiring ranks on their way out, what they had sent, and the picture of all ranks for `status`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.status import RankInfo, RankState
from elasticmoe_sglang.coordinator.worker_channel import WorkerChannel
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.wire.to_coordinator import Hello, Retired
from elasticmoe_sglang.wire.to_imm import Population
from elasticmoe_sglang.wire.to_worker import ReleaseMigrated, Resumed

logger = logging.getLogger(__name__)

# How long what a rank has sent may take through the detokenizer before its requests go on regardless.
OUTPUT_FENCE_S = 5.0
_LOOK_S = 0.05
_POLL_S = 0.002
_REMEMBERED = 64


@dataclass
class Departure:
    """A retiring rank between its commit and its exit.

    migration: moves its requests to the survivors; its result is how many there were.
    died: its process ended before all of them had gone.
    """

    operation_id: str
    survivors: tuple[int, ...]
    migration: asyncio.Task[int] | None = None
    died: bool = False


async def migrations_done(departures: Collection[Departure], timeout_s: float = OUTPUT_FENCE_S) -> None:
    """Until the requests of all retiring ranks are with survivors; one that died has none that could still come."""
    deadline = time.monotonic() + timeout_s
    while pending := [d.migration for d in departures if d.migration and not d.died and not d.migration.done()]:
        if time.monotonic() > deadline:
            logger.error("%d retiring ranks have not migrated within %.0f s; going on", len(pending), timeout_s)
            return
        await asyncio.wait(pending, timeout=_LOOK_S)


class OutputFences:
    """Fences that ranks put behind what they had sent; each comes through the detokenizer to the tokenizer."""

    def __init__(self) -> None:
        self._passed: dict[str, set[int]] = {}

    def passed(self, operation_id: str, rank: int) -> None:
        self._passed.setdefault(operation_id, set()).add(rank)
        while len(self._passed) > _REMEMBERED:
            del self._passed[next(iter(self._passed))]

    async def wait(self, operation_id: str, ranks: Collection[int], timeout_s: float = OUTPUT_FENCE_S) -> bool:
        """Until the fences of all these ranks have passed; False when one did not come in time, which is logged."""
        deadline = time.monotonic() + timeout_s
        while absent := set(ranks) - self._passed.get(operation_id, set()):
            if time.monotonic() > deadline:
                logger.error("output of ranks %s did not pass within %.0f s; going on", sorted(absent), timeout_s)
                return False
            await asyncio.sleep(_POLL_S)
        return True


async def migrate(channel: WorkerChannel, fences: OutputFences, departure: Departure, left: Retired) -> int:
    """Tell the survivors to go on with what the retiring rank has sent them, and wait until all of it runs there, its
    KV copied out of the retiring rank's memory. Returns the number of requests."""
    await fences.wait(departure.operation_id, [left.rank])
    with_kv = 0

    async def resumed(survivor: int, migrated: int) -> int:
        nonlocal with_kv
        chunks = left.kv_chunks.get(survivor, ())
        release = ReleaseMigrated(operation_id=departure.operation_id, retiring_rank=left.rank, kv_chunks=chunks)
        try:
            await channel.tell_worker(survivor, release)
            message = await channel.wait_for(
                Resumed, rank=survivor, about=lambda message: message.retiring_rank == left.rank
            )
        except WorkerError as error:
            # What only it had is sent again when the others have got over its death.
            logger.warning(
                "rank %d died with %d requests of retiring rank %d: %s", survivor, migrated, left.rank, error
            )
            return migrated
        with_kv += message.with_kv
        return message.requests

    total = sum(left.migrated.values())
    lost = total - sum(await asyncio.gather(*(resumed(*item) for item in left.migrated.items())))
    logger.info("rank %d migrated %d requests, %d with their KV (%d tokens)", left.rank, total, with_kv, left.kv_tokens)
    if lost:
        raise WorkerError(f"{lost} requests of rank {left.rank} did not arrive", rank=left.rank)
    return total


def snapshot(
    config: ElasticConfig,
    *,
    active: Collection[int],
    pids: Mapping[int, int],
    population: Population,
    joining: Collection[int],
    retiring: Collection[int],
    hellos: Mapping[int, Hello],
    kv: Callable[[int], tuple[int, int, int]],
    kv_bytes: Mapping[int, int],
) -> list[RankInfo]:
    """All ranks, ascending. An inactive rank shows the standby that would take it, ready ones first.

    Args:
        active: the committed membership; pids: rank -> process; population: for the processes without a rank.
        hellos: what each rank's process said when it had booted.
        kv: a rank's (capacity, used, cached) KV tokens, zeros when it has not said so.
        kv_bytes: HMM memory of each rank's KV cache.
    """
    waiting = iter(
        [(RankState.STANDBY, pid) for pid in population.standbys]
        + [(RankState.STARTING, pid) for pid in population.starting]
    )
    infos = []
    for rank in range(config.max_ep_size):
        pid = pids.get(rank)
        if rank in retiring:
            state = RankState.RETIRING
        elif rank in joining:
            state = RankState.JOINING
        elif rank in active:
            state = RankState.ACTIVE
        else:
            state, pid = next(waiting, (RankState.INACTIVE, None))
        hello = hellos.get(rank)
        tokens = kv(rank) if state is RankState.ACTIVE else (0, 0, 0)
        infos.append(
            RankInfo(
                rank=rank,
                state=state,
                device=config.device_of(rank),
                pid=pid,
                checkpoint_bytes=hello.checkpoint_bytes if hello else None,
                load_s=hello.load_s if hello else None,
                kv_bytes=kv_bytes.get(rank) if state is RankState.ACTIVE else None,
                kv_tokens=tokens[0] if tokens[0] else None,
                kv_used=tokens[1] if tokens[0] else None,
                kv_cached=tokens[2] if tokens[0] else None,
            )
        )
    return infos
