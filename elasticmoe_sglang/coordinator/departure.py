"""Who is where: leavers on their way out, and the picture of all seats for `status`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.seat_lines import SeatLines
from elasticmoe_sglang.coordinator.views import SeatInfo, SeatState
from elasticmoe_sglang.errors import SeatError
from elasticmoe_sglang.seats.messages import Adopted, Hello, Left, ReleaseAdopted

logger = logging.getLogger(__name__)

OUTPUT_FENCE_S = 5.0
"""How long a leaver's last tokens may take through the detokenizer before its requests go on regardless."""


@dataclass
class Departure:
    """A leaver between its commit and its exit.

    fence: set when the fence behind its last output has come through the detokenizer.
    handover: moves its requests to the survivors; its result is how many there were.
    """

    operation_id: str
    survivors: tuple[int, ...]
    fence: asyncio.Event = field(default_factory=asyncio.Event)
    handover: asyncio.Task[int] | None = None


async def hand_over(lines: SeatLines, departure: Departure, left: Left) -> int:
    """Tell the survivors to go on with what the leaver has sent them, and wait until all of it runs there, its KV
    copied out of the leaver's memory. Returns the number of requests."""
    try:
        await asyncio.wait_for(departure.fence.wait(), OUTPUT_FENCE_S)
    except asyncio.TimeoutError:
        logger.error("seat %d's last output did not pass within %.0f s; going on", left.seat, OUTPUT_FENCE_S)

    with_kv = 0

    async def adopted(survivor: int, handed: int) -> int:
        nonlocal with_kv
        chunks = left.kv_chunks.get(survivor, ())
        release = ReleaseAdopted(operation_id=departure.operation_id, leaver=left.seat, kv_chunks=chunks)
        try:
            await lines.tell_seat(survivor, release)
            message = await lines.expect(Adopted, seat=survivor, about=lambda heard: heard.leaver == left.seat)
        except SeatError as error:
            # What only it had is sent again when the others have got over its death.
            logger.warning("seat %d died with %d requests of leaver %d: %s", survivor, handed, left.seat, error)
            return handed
        with_kv += message.with_kv
        return message.requests

    total = sum(left.handed.values())
    lost = total - sum(await asyncio.gather(*(adopted(*item) for item in left.handed.items())))
    logger.info(
        "seat %d handed over %d requests, %d with their KV (%d tokens)", left.seat, total, with_kv, left.kv_tokens
    )
    if lost:
        raise SeatError(f"{lost} requests of seat {left.seat} did not arrive", seat=left.seat)
    return total


def picture(
    config: ElasticConfig,
    *,
    occupied: Collection[int],
    pids: Mapping[int, int],
    standbys: Sequence[int],
    booting: Collection[int],
    leaving: Collection[int],
    hellos: Mapping[int, Hello],
    kv: Callable[[int], tuple[int, int, int]],
) -> list[SeatInfo]:
    """All seats, ascending. An empty seat shows the standby that would take it.

    Args:
        occupied: the committed membership; pids: seat -> process; standbys: processes without a seat.
        hellos: what each seat's process said when it had booted.
        kv: a seat's (capacity, used, cached) KV tokens, zeros when it has not said so.
    """
    waiting = iter(standbys)
    infos = []
    for seat in range(config.max_ep_size):
        pid = pids.get(seat)
        if seat in leaving:
            state = SeatState.LEAVING
        elif seat in booting:
            state = SeatState.BOOTING
        elif seat in occupied:
            state = SeatState.OCCUPIED
        else:
            pid = next(waiting, None)
            state = SeatState.STANDBY if pid is not None else SeatState.EMPTY
        hello = hellos.get(seat)
        tokens = kv(seat) if state is SeatState.OCCUPIED else (0, 0, 0)
        infos.append(
            SeatInfo(
                seat=seat,
                state=state,
                device=config.device_of(seat),
                pid=pid,
                checkpoint_bytes=hello.checkpoint_bytes if hello else None,
                load_s=hello.load_s if hello else None,
                kv_tokens=tokens[0] if tokens[0] else None,
                kv_used=tokens[1] if tokens[0] else None,
                kv_cached=tokens[2] if tokens[0] else None,
            )
        )
    return infos
