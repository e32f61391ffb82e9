"""The coordinator's line to real IMMs that end: workers go on, another IMM adopts them, nothing asked for is lost."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from elasticmoe_sglang.coordinator.imm_line import ImmLine
from elasticmoe_sglang.descriptors import RESERVE
from elasticmoe_sglang.imm.client import ImmClient
from elasticmoe_sglang.lifeline import Lifeline
from elasticmoe_sglang.wire.to_coordinator import FromImm, WorkerExited
from elasticmoe_sglang.wire.to_imm import Assign, Assigned, KillWorker, Population, Query, Refused, Register
from tests.contract.test_imm import STANDBYS, ended, join_spec, runs, start
from tests.helpers.limits import limited

pytestmark = pytest.mark.usefixtures("gives_all_back")

WITHIN_S = 30.0

uvloop.new_event_loop().close()  # libuv's own descriptors stay until the process ends


class Site:
    """An IMM, the line to it, and what the line has said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lifeline = Lifeline.hold(str(folder / "lifeline"))
        self.started: list[subprocess.Popen[bytes]] = []
        self.told: list[FromImm] = []
        self.ending = False
        self.fails = 0
        self.line = ImmLine(str(folder / "imm.sock"), self.told.append, self._next)

    def _next(self) -> subprocess.Popen[bytes] | None:
        if self.ending:
            return None
        if self.fails:
            self.fails -= 1
            return subprocess.Popen(["false"])
        return self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.started.append(start(self.folder))
        return self.started[-1]

    async def open(self) -> None:
        self.start()
        await asyncio.to_thread(lambda: ImmClient(str(self.folder / "imm.sock"), timeout_s=WITHIN_S).close())
        self.line.open()

    def kill_imm(self) -> None:
        self.started[-1].kill()
        self.started[-1].wait()

    def assign(self, rank: int, order: str = "hang") -> None:
        self.line.tell(Register(rank=rank, arguments=order.encode()))
        self.line.tell(Assign(join_spec=join_spec(rank)))

    async def until(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + WITHIN_S
        while not (found := condition()):
            assert time.monotonic() < deadline, f"{what}: {self.told[-5:]}"
            await asyncio.sleep(0.01)
        return found

    async def worker(self, rank: int) -> int:
        return await self.until(lambda: self.pid(rank), f"rank {rank} is assigned")

    def pid(self, rank: int) -> int | None:
        return next((m.pid for m in reversed(self.told) if isinstance(m, Assigned) and m.rank == rank), None)

    def exits(self) -> list[WorkerExited]:
        return [message for message in self.told if isinstance(message, WorkerExited)]

    def population(self) -> Population | None:
        return next((m for m in reversed(self.told) if isinstance(m, Population)), None)

    async def whole(self, ranks: dict[int, int]) -> None:
        """An IMM has these workers, and standbys."""
        await self.until(
            lambda: (p := self.population()) and p.ranks == ranks and len(p.standbys) == STANDBYS,
            f"{ranks} and standbys",
        )
        assert (await asyncio.to_thread(self.ask)).ranks == ranks

    def ask(self) -> Population:
        """What the IMM itself says, to somebody else."""
        client = ImmClient(str(self.folder / "imm.sock"), timeout_s=WITHIN_S)
        client.send(Query())
        while not isinstance(message := client.receive(WITHIN_S), Population):
            assert message is not None
        client.close()
        return message

    def close(self) -> None:
        self.line.close()
        self.lifeline.cut()
        for process in self.started:
            process.wait(WITHIN_S)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[Site], Coroutine[Any, Any, None]]], None]:
    async def body(main: Callable[[Site], Coroutine[Any, Any, None]]) -> None:
        site = Site(tmp_path)
        try:
            await site.open()
            await main(site)
        finally:
            site.close()

    def call(main: Callable[[Site], Coroutine[Any, Any, None]]) -> None:
        loop = uvloop.new_event_loop()  # the coordinator's; it makes the sockets that it watches non-blocking
        try:
            loop.run_until_complete(body(main))
        finally:
            loop.close()

    return call


def test_another_imm_adopts_the_workers_and_refills_standbys(run) -> None:
    async def main(site: Site) -> None:
        site.assign(1)
        site.assign(2)
        ranks = {1: await site.worker(1), 2: await site.worker(2)}
        await site.whole(ranks)
        for _ in range(2):  # also workers of the last but one
            site.kill_imm()
            await site.until(lambda: site.population() == Population(ranks=ranks, standbys=[], starting=[]), "no IMM")
            await site.whole(ranks)
            assert all(runs(pid) for pid in ranks.values()) and not site.exits()
        assert [m for m in site.told if isinstance(m, Population)][-1].ranks == ranks
        first = next(i for i, m in enumerate(site.told) if isinstance(m, Population) and m.ranks == ranks)
        assert all(m.ranks == ranks for m in site.told[first:] if isinstance(m, Population)), "never forgotten"
        os.kill(ranks[1], signal.SIGKILL)
        await site.until(site.exits, "the exit is reported")
        assert [(e.rank, e.pid, e.status) for e in site.exits()] == [(1, ranks[1], None)]
        site.line.tell(Assign(join_spec=join_spec(1)))  # registered with the first IMM
        await site.until(lambda: site.pid(1) != ranks[1], "rank 1 is assigned again")
        site.line.tell(KillWorker(rank=1))
        exits = await site.until(lambda: site.exits()[1:], "it is killed")
        assert exits[0].status == -signal.SIGKILL, "this IMM is its parent"
        site.line.tell(KillWorker(rank=2))
        await site.until(lambda: site.exits()[2:], "and so is one that was adopted")
        await site.whole({})
        assert len(site.started) == 3

    run(main)


def test_what_happens_without_an_imm_is_not_lost(run) -> None:
    """Exits are reported meanwhile, once; a worker can be killed; an assignment waits for the next IMM."""

    async def main(site: Site) -> None:
        for rank in (0, 1, 2):
            site.assign(rank)
        pids = {rank: await site.worker(rank) for rank in (0, 1, 2)}
        await site.until(lambda: (p := site.population()) and len(p.ranks) == 3, "three ranks")
        site.fails = 2  # the next two IMMs end before they listen
        site.kill_imm()
        await site.until(lambda: site.population() == Population(ranks=pids, standbys=[], starting=[]), "no IMM")
        os.kill(pids[1], signal.SIGKILL)
        site.line.tell(KillWorker(rank=2))
        await site.until(lambda: len(site.exits()) == 2, "both exits are reported")
        site.line.tell(Assign(join_spec=join_spec(1)))
        site.line.tell(Assign(join_spec=join_spec(3)))
        site.line.tell(KillWorker(rank=3))  # taken back before anybody has heard it
        assert site.fails == 0 or len(site.started) == 1
        other = await site.until(lambda: (p := site.pid(1)) != pids[1] and p, "rank 1 is assigned by the next IMM")
        await site.whole({0: pids[0], 1: other})
        assert {e.rank: e.pid for e in site.exits()} == {1: pids[1], 2: pids[2]} and len(site.exits()) == 2
        assert site.pid(3) is None and not [m for m in site.told if isinstance(m, Refused)]

    run(main)


def test_a_request_that_the_imm_died_with_is_asked_again(run) -> None:
    async def main(site: Site) -> None:
        site.assign(0)
        pid = await site.worker(0)
        await site.whole({0: pid})
        site.started[-1].send_signal(signal.SIGSTOP)
        site.assign(1)
        site.kill_imm()
        other = await site.worker(1)
        await site.whole({0: pid, 1: other})

    run(main)


def test_an_imm_gets_more_than_its_socket_holds(run) -> None:
    """Launch arguments of 16 ranks, 60 KiB each: a socket's buffer has room for three of them."""

    async def main(site: Site) -> None:
        site.assign(0)
        ranks = {0: await site.worker(0)}
        for rank in range(1, 16):
            site.line.tell(Register(rank=rank, arguments=b"hang" + b" " * (60 << 10)))
        await site.whole(ranks)
        site.kill_imm()
        await site.until(lambda: site.population() == Population(ranks=ranks, standbys=[], starting=[]), "no IMM")
        await site.whole(ranks)
        assert len(site.started) == 2, "the first one that was started was handed everything"
        site.line.tell(Assign(join_spec=join_spec(15)))
        await site.worker(15)

    run(main)


def test_a_server_that_ends_gets_no_other_imm(run) -> None:
    async def main(site: Site) -> None:
        site.assign(1)
        pid = await site.worker(1)
        site.ending = True
        site.kill_imm()
        await site.until(lambda: (p := site.population()) and not p.standbys and p.ranks, "no IMM")
        await asyncio.sleep(0.3)
        assert len(site.started) == 1 and runs(pid)
        site.lifeline.cut()
        ended([pid])
        await site.until(site.exits, "its exit is reported")

    run(main)


def test_no_worker_is_asked_for_that_could_not_be_accepted(run) -> None:
    """ZMQ ends a process that accepts a worker's connection and has no descriptor for it."""

    async def main(site: Site) -> None:
        with limited(os.getpid(), resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) + RESERVE // 2):
            site.assign(1)
            await site.until(lambda: [m for m in site.told if isinstance(m, Refused) and m.rank == 1], "it is refused")
        site.assign(1)
        await site.worker(1)

    run(main)
