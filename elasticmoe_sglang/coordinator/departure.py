"""Who is where: leavers on their way out, what they had sent, and the picture of all seats for `status`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.seat_lines import SeatLines
from elasticmoe_sglang.coordinator.views import SeatInfo, SeatState
from elasticmoe_sglang.errors import SeatError
from elasticmoe_sglang.seats.messages import Adopted, Hello, Left, ReleaseAdopted

logger = logging.getLogger(__name__)

# How long what a seat has sent may take through the detokenizer before its requests go on regardless.
OUTPUT_FENCE_S = 5.0
_LOOK_S = 0.05
_POLL_S = 0.002
_REMEMBERED = 64


@dataclass
class Departure:
    """A leaver between its commit and its exit.

    handover: moves its requests to the survivors; its result is how many there were.
    died: its process ended before all of them had gone.
    """

    operation_id: str
    survivors: tuple[int, ...]
    handover: asyncio.Task[int] | None = None
    died: bool = False


async def handed_over(departures: Collection[Departure], timeout_s: float = OUTPUT_FENCE_S) -> None:
    """Until the requests of all leavers are with survivors; one that died has none that could still come."""
    deadline = time.monotonic() + timeout_s
    while pending := [d.handover for d in departures if d.handover and not d.died and not d.handover.done()]:
        if time.monotonic() > deadline:
            logger.error("%d leavers have not handed over within %.0f s; going on", len(pending), timeout_s)
            return
        await asyncio.wait(pending, timeout=_LOOK_S)


class OutputFences:
    """Fences that seats put behind what they had sent; each comes through the detokenizer to the tokenizer."""

    def __init__(self) -> None:
        self._passed: dict[str, set[int]] = {}

    def passed(self, operation_id: str, seat: int) -> None:
        self._passed.setdefault(operation_id, set()).add(seat)
        while len(self._passed) > _REMEMBERED:
            del self._passed[next(iter(self._passed))]

    async def wait(self, operation_id: str, seats: Collection[int], timeout_s: float = OUTPUT_FENCE_S) -> bool:
        """Until the fences of all these seats have passed; False when one did not come in time, which is logged."""
        deadline = time.monotonic() + timeout_s
        while absent := set(seats) - self._passed.get(operation_id, set()):
            if time.monotonic() > deadline:
                logger.error("output of seats %s did not pass within %.0f s; going on", sorted(absent), timeout_s)
                return False
            await asyncio.sleep(_POLL_S)
        return True


async def hand_over(lines: SeatLines, fences: OutputFences, departure: Departure, left: Left) -> int:
    """Tell the survivors to go on with what the leaver has sent them, and wait until all of it runs there, its KV
    copied out of the leaver's memory. Returns the number of requests."""
    await fences.wait(departure.operation_id, [left.seat])
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
    kv_bytes: Mapping[int, int],
) -> list[SeatInfo]:
    """All seats, ascending. An empty seat shows the standby that would take it.

    Args:
        occupied: the committed membership; pids: seat -> process; standbys: processes without a seat.
        hellos: what each seat's process said when it had booted.
        kv: a seat's (capacity, used, cached) KV tokens, zeros when it has not said so.
        kv_bytes: HMM memory of each seat's KV cache.
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
                kv_bytes=kv_bytes.get(seat) if state is SeatState.OCCUPIED else None,
                kv_tokens=tokens[0] if tokens[0] else None,
                kv_used=tokens[1] if tokens[0] else None,
                kv_cached=tokens[2] if tokens[0] else None,
            )
        )
    return infos
