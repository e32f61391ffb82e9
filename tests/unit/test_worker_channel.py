"""Who gets which message: exits concern everybody, failures only the operation that failed."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_sglang.coordinator.worker_channel import WorkerChannel
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.wire import to_imm
from elasticmoe_sglang.wire.seqpacket import receive_bytes, send_packet
from elasticmoe_sglang.wire.to_coordinator import FROM_IMM, WorkerExited
from elasticmoe_sglang.wire.to_worker import Failed, Pulled, Resumed

EXIT = WorkerExited(rank=1, pid=7, status=-9)


def lines() -> WorkerChannel:
    return WorkerChannel("ipc:///unused", "/unused", lambda _: None, lambda: None)


def resumed(retiring_rank: int) -> Resumed:
    return Resumed(rank=1, operation_id="o", retiring_rank=retiring_rank, requests=1, with_kv=0, recomputed=0)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 5))


def test_an_exit_reaches_everybody_who_waits_and_whoever_asks_later() -> None:
    async def main() -> None:
        hub = lines()
        waiting = [
            asyncio.ensure_future(
                hub.wait_for(
                    Resumed,
                    rank=1,
                    about=lambda message, retiring_rank=retiring_rank: message.retiring_rank == retiring_rank,
                )  # type: ignore[misc]
            )
            for retiring_rank in (2, 3)
        ]
        other = asyncio.ensure_future(hub.wait_for(Resumed, rank=0))
        await asyncio.sleep(0)
        hub._deliver(EXIT)
        for task in waiting:
            with pytest.raises(WorkerError, match="the worker of rank 1"):
                await task
        with pytest.raises(WorkerError, match="the worker of rank 1"):
            await hub.wait_for(Pulled, rank=1, operation_id="late")
        assert await hub.wait_for(WorkerExited, rank=1, exits=False) == EXIT
        hub.forget(lambda message: getattr(message, "rank", None) == 1)  # another worker takes the rank
        hub._deliver(resumed(2))
        assert await hub.wait_for(Resumed, rank=1) == resumed(2)
        assert not other.done()
        other.cancel()

    run(main())


def test_what_was_said_before_the_exit_still_counts() -> None:
    async def main() -> None:
        hub = lines()
        hub._deliver(resumed(2))
        hub._deliver(EXIT)
        assert await hub.wait_for(Resumed, rank=1) == resumed(2)

    run(main())


def test_a_failure_belongs_to_its_operation() -> None:
    async def main() -> None:
        hub = lines()
        hub._deliver(Failed(rank=1, operation_id="old", reason="no room"))
        hub._deliver(resumed(2))
        assert await hub.wait_for(Resumed, rank=1) == resumed(2)
        with pytest.raises(WorkerError, match="no room"):
            await hub.wait_for(Pulled, rank=1, operation_id="old")

    run(main())


def test_a_line_opened_late_learns_who_sits_where(tmp_path: Path) -> None:
    """The controller may have filled ranks before the coordinator connected: what the IMM said then was not for it."""
    population = to_imm.Population(ranks={0: os.getpid()}, standbys=[13], starting=[])
    assigned = to_imm.Assigned(rank=0, pid=os.getpid())
    pidfd = os.pidfd_open(os.getpid())

    async def main() -> None:
        message: asyncio.Queue[Any] = asyncio.Queue()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(tmp_path / "imm"))
            listener.listen()
            hub = WorkerChannel(f"ipc://{tmp_path}/ranks", str(tmp_path / "imm"), message.put_nowait, lambda: None)
            hub.open()
            with listener.accept()[0] as line:
                assert to_imm.REQUESTS.unpack(receive_bytes(line)) == to_imm.Query()
                send_packet(line, FROM_IMM.pack(assigned), [pidfd])
                send_packet(line, FROM_IMM.pack(population))
                assert await message.get() == assigned
                assert await message.get() == population
                hub.close()

    run(main())
    os.close(pidfd)
