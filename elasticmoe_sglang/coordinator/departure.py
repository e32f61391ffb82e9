"""Who is where: leavers on their way out, and the picture of all seats for `status`."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.views import SeatInfo, SeatState
from elasticmoe_sglang.seats.messages import Hello


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


def picture(
    config: ElasticConfig,
    *,
    occupied: Collection[int],
    pids: Mapping[int, int],
    standbys: Sequence[int],
    booting: Collection[int],
    leaving: Collection[int],
    hellos: Mapping[int, Hello],
) -> list[SeatInfo]:
    """All seats, ascending. An empty seat shows the standby that would take it.

    Args:
        occupied: the committed membership; pids: seat -> process; standbys: processes without a seat.
        hellos: what each seat's process said when it had booted.
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
        infos.append(
            SeatInfo(
                seat=seat,
                state=state,
                device=config.device_of(seat),
                pid=pid,
                checkpoint_bytes=hello.checkpoint_bytes if hello else None,
                load_s=hello.load_s if hello else None,
            )
        )
    return infos
