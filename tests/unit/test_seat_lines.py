"""Who gets which message: exits concern everybody, failures only the operation that failed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_sglang.coordinator.seat_lines import SeatLines
from elasticmoe_sglang.errors import SeatError
from elasticmoe_sglang.imm import messages as imm
from elasticmoe_sglang.seats import messages as sm

EXIT = imm.SeatExited(seat=1, pid=7, status=-9)


def lines() -> SeatLines:
    return SeatLines("ipc:///unused", "/unused", lambda _: None, lambda _: None)


def adopted(leaver: int) -> sm.Adopted:
    return sm.Adopted(seat=1, operation_id="o", leaver=leaver, requests=1, with_kv=0)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 5))


def test_an_exit_reaches_everybody_who_waits_and_whoever_asks_later() -> None:
    async def main() -> None:
        hub = lines()
        waiting = [
            asyncio.ensure_future(
                hub.expect(sm.Adopted, seat=1, about=lambda message, leaver=leaver: message.leaver == leaver)  # type: ignore[misc]
            )
            for leaver in (2, 3)
        ]
        other = asyncio.ensure_future(hub.expect(sm.Adopted, seat=0))
        await asyncio.sleep(0)
        hub._heard(EXIT)
        for task in waiting:
            with pytest.raises(SeatError, match="the process of seat 1"):
                await task
        with pytest.raises(SeatError, match="the process of seat 1"):
            await hub.expect(sm.Pulled, seat=1, operation_id="late")
        assert await hub.expect(imm.SeatExited, seat=1, exits=False) == EXIT
        hub.forget(lambda message: getattr(message, "seat", None) == 1)  # another process takes the seat
        hub._heard(adopted(2))
        assert await hub.expect(sm.Adopted, seat=1) == adopted(2)
        assert not other.done()
        other.cancel()

    run(main())


def test_what_was_said_before_the_exit_still_counts() -> None:
    async def main() -> None:
        hub = lines()
        hub._heard(adopted(2))
        hub._heard(EXIT)
        assert await hub.expect(sm.Adopted, seat=1) == adopted(2)

    run(main())


def test_a_failure_belongs_to_its_operation() -> None:
    async def main() -> None:
        hub = lines()
        hub._heard(sm.Failed(seat=1, operation_id="old", reason="no room"))
        hub._heard(adopted(2))
        assert await hub.expect(sm.Adopted, seat=1) == adopted(2)
        with pytest.raises(SeatError, match="no room"):
            await hub.expect(sm.Pulled, seat=1, operation_id="old")

    run(main())


def test_a_line_opened_late_learns_who_sits_where(tmp_path: Path) -> None:
    """The controller may have filled seats before the coordinator connected: what the IMM said then was not for it."""
    population = imm.Population(seats={0: 11, 1: 12}, standbys=[13])

    async def main() -> None:
        heard: asyncio.Queue[Any] = asyncio.Queue()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(tmp_path / "imm"))
            listener.listen()
            hub = SeatLines(f"ipc://{tmp_path}/seats", str(tmp_path / "imm"), heard.put_nowait, lambda _: None)
            hub.open()
            with listener.accept()[0] as line:
                assert imm.decode(line.recv(imm.MAX_FRAME)) == imm.Query()
                line.send(imm.encode(population))
                assert await heard.get() == population
                hub.close()

    run(main())
