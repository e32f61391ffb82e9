"""Retiring ranks between commit and exit: migration of their requests; and the snapshot of all ranks for `status`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.status import Moved, RankInfo, RankState
from elasticmoe_sglang.coordinator.worker_channel import WorkerChannel
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.wire.to_coordinator import Hello, Retired
from elasticmoe_sglang.wire.to_imm import Population
from elasticmoe_sglang.wire.to_worker import MapMigrated, ReleaseMigrated, Resumed

logger = logging.getLogger(__name__)

# After this long, the requests of a rank whose output has not passed are taken from the journal instead.
OUTPUT_FENCE_S = 5.0
_POLL_S = 0.002
_REMEMBERED = 64


class OutputFences:
    """Fences that ranks send behind their last output, through the detokenizer to the tokenizer."""

    def __init__(self) -> None:
        self._passed: dict[str, set[int]] = {}

    def passed(self, operation_id: str, rank: int) -> None:
        self._passed.setdefault(operation_id, set()).add(rank)
        while len(self._passed) > _REMEMBERED:
            del self._passed[next(iter(self._passed))]

    async def wait(self, operation_id: str, ranks: Collection[int], timeout_s: float = OUTPUT_FENCE_S) -> bool:
        """Wait until the fences of all these ranks have passed; False, and logged, if one did not in time."""
        deadline = time.monotonic() + timeout_s
        while absent := set(ranks) - self._passed.get(operation_id, set()):
            if time.monotonic() > deadline:
                logger.error("output of ranks %s did not pass within %.0f s", sorted(absent), timeout_s)
                return False
            await asyncio.sleep(_POLL_S)
        return True


async def migrate(
    channel: WorkerChannel, fences: OutputFences, retired: Retired, mates_of: Callable[[int], Sequence[int]]
) -> Moved:
    """Have the survivors resume the requests that the retiring rank sent them, and wait until all run there and their
    KV has been copied out of the retiring rank's memory.

    Args:
        mates_of: returns the ranks of a rank's attention replica. All of a survivor's copy their parts of the KV; the
            one that leads it got the requests, and answers for it.

    Raises:
        WorkerError: the rank's last output did not arrive in time, or requests are missing at survivors.
    """
    began = time.monotonic()
    for survivor, chunks in retired.kv_chunks.items():
        if chunks:  # mapped while the last output is on its way
            request = MapMigrated(operation_id=retired.operation_id, retiring_rank=retired.rank, kv_chunks=chunks)
            for mate in mates_of(survivor):
                with contextlib.suppress(WorkerError):  # it has died, which shows below
                    await channel.tell_worker(mate, request)
    if not await fences.wait(retired.operation_id, [retired.rank]):
        raise WorkerError("its last output did not arrive in time", rank=retired.rank, operation=retired.operation_id)
    passed = time.monotonic()
    with_kv = recomputed = 0

    async def resumed(survivor: int, migrated: int) -> int:
        nonlocal with_kv, recomputed
        mapped = bool(retired.kv_chunks.get(survivor))
        release = ReleaseMigrated(operation_id=retired.operation_id, retiring_rank=retired.rank, mapped=mapped)
        try:
            for mate in mates_of(survivor):
                await channel.tell_worker(mate, release)
            message = await channel.wait_for(
                Resumed, rank=survivor, about=lambda message: message.retiring_rank == retired.rank
            )
        except WorkerError as error:
            # Requests that only its worker had are sent again after survivors recover.
            logger.warning(
                "rank %d died with %d requests of retiring rank %d: %s", survivor, migrated, retired.rank, error
            )
            return migrated
        with_kv += message.with_kv
        recomputed += message.recomputed
        return message.requests

    total = sum(retired.migrated.values())
    lost = total - sum(await asyncio.gather(*(resumed(*item) for item in retired.migrated.items())))
    logger.info(
        "rank %d migrated %d requests, %d with their KV (%d tokens): its output had passed after %.0f ms, they ran "
        "again after %.0f ms",
        retired.rank,
        total,
        with_kv,
        retired.kv_tokens,
        (passed - began) * 1e3,
        (time.monotonic() - began) * 1e3,
    )
    if lost:
        raise WorkerError(
            f"{lost} requests of retiring rank {retired.rank} did not arrive at survivors", rank=retired.rank
        )
    return Moved(requests=total, recomputed=recomputed)


def snapshot(
    config: ElasticConfig,
    *,
    active: Collection[int],
    pids: Mapping[int, int],
    population: Population,
    joining: Collection[int],
    retiring: Collection[int],
    hot: Collection[int],
    booting: Collection[int],
    hellos: Mapping[int, Hello],
    first_uses: Mapping[int, int],
    kv: Callable[[int], tuple[int, int, int]],
    kv_bytes: Mapping[int, int],
) -> list[RankInfo]:
    """All ranks, ascending. Standby workers are shown at the lowest inactive ranks, ready ones first.

    Args:
        hot: inactive ranks whose worker waits to join; booting: those for which one boots.
        active: the committed membership; pids: rank -> pid of its worker; population: for the standby workers.
        hellos: each worker's report of its boot.
        first_uses: how many kernels each has loaded since.
        kv: returns a rank's (capacity, used, cached) KV tokens, zeros if its worker has not reported them.
        kv_bytes: HMM memory of each rank's KV cache.
    """
    waiting = iter(
        # One that has just been assigned to a rank is still among them until the IMM says what there is now.
        [(RankState.STANDBY, pid) for pid in population.standbys if pid not in pids.values()]
        + [(RankState.STARTING, pid) for pid in population.starting if pid not in pids.values()]
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
        elif rank in hot:
            state = RankState.HOT
        elif rank in booting and pid is not None:
            state = RankState.STARTING
        else:
            state, pid = next(waiting, (RankState.INACTIVE, None))
        hello = hellos.get(rank)
        tokens = kv(rank) if state is RankState.ACTIVE else (0, 0, 0)
        infos.append(
            RankInfo(
                rank=rank,
                state=state,
                device=config.device_of(rank),
                cores=config.cores_of(rank),
                pid=pid,
                checkpoint_bytes=hello.checkpoint_bytes if hello else None,
                load_s=hello.load_s if hello else None,
                first_uses=first_uses.get(rank, 0) if hello else None,
                kv_bytes=kv_bytes.get(rank) if state is RankState.ACTIVE else None,
                kv_tokens=tokens[0] if tokens[0] else None,
                kv_used=tokens[1] if tokens[0] else None,
                kv_cached=tokens[2] if tokens[0] else None,
            )
        )
    return infos
