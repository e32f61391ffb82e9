"""Changes with faults injected at random, under load with aborts and disconnects: nothing lost, nothing leaked.

Two of three changes meet a fault: at one of the points of `elasticmoe_sglang/faults.py` a seat is killed, fails, or
stands still for a moment, or it kills the HMM; or at no point in particular a seat, the HMM or a standby is killed. A
change may then be undone; what has to hold is that afterwards the server is whole, and every stream complete and right.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_sglang.faults import ENV_FAULTS
from elasticmoe_sglang.tiny_model import VOCAB, make_tiny_model
from tests.helpers.chaos import TOKENS, Chaos
from tests.helpers.corpus import ask
from tests.helpers.elastic import SEATS, ElasticServer
from tests.helpers.faults import SETTLED_WITHIN_S, arm, armed, ask_for, change, disarm, imbalance, whole
from tests.helpers.footprint import leaves_nothing, rest
from tests.helpers.load import Load, Pump, settled
from tests.helpers.record import record

pytestmark = [pytest.mark.e2e, pytest.mark.soak]

CHANGES = 200
STREAMS = 6
FAULTY = 2 / 3
STALL_S = 0.5
_UP = ("boot.attached", "boot.gate", "commit.received", "gate.before", "gate.after")
_DOWN = (
    "pull.started",
    "pull.done",
    "commit.received",
    "gate.before",
    "gate.after",
    "leave.sending",
    "leave.sent",
    "adopt.before",
)
_OF_JOINERS, _OF_LEAVERS = ("boot.attached", "boot.gate"), ("leave.sending", "leave.sent")
_RAISING = ("boot.attached", "pull.started", "pull.done")
"""Points at which the seat's own code may fail; at the others nothing of a seat's can but its process."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A change, and who has which part in it."""

    body: dict[str, Any]
    joining: list[int]
    leaving: list[int]
    staying: list[int]


@dataclass
class Storm:
    """The server with its dice, and what happened."""

    server: ElasticServer
    run_dir: Path
    rng: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    whole_s: list[float] = field(default_factory=list)
    killed: int | None = None
    """The process that was killed at random last; its death may be noticed after the change has ended."""

    def one(self) -> None:
        """One change with what befalls it, until the server is whole again."""
        wish = self._wish()
        faulty = self.rng.random() < FAULTY
        aimed = faulty and self.rng.random() < 0.7
        fault = self._arm(wish) if aimed else None
        operation = ask_for(self.server, wish.body | {"wait": False})
        if faulty and not aimed:
            fault = self._kill_somebody()
        operation = self.server.ended(operation["operation_id"])
        if fault is not None and not armed(self.run_dir):
            self.faults[fault] += 1
        disarm(self.run_dir)
        self.phases[operation["phase"]] += 1
        print(f"{sum(self.phases.values())}: {wish.body}, {fault}: {operation['phase']}, {operation['error']}")
        assert fault is not None or operation["phase"] == "done", operation["error"]
        self._settle()

    def _settle(self) -> None:
        started = time.monotonic()
        try:
            settled(self._over_it, SETTLED_WITHIN_S, "the server is whole again")
        except TimeoutError as error:
            raise AssertionError(f"{imbalance(self.server.status())}\n{self.server.log_tail(150)}") from error
        self.whole_s.append(time.monotonic() - started)

    def _over_it(self) -> bool:
        status = self.server.status()
        pids = {status["memory"]["pid"], *(seat["pid"] for seat in status["seats"])}
        return self.killed not in pids - {None} and whole(self.server)

    def _wish(self) -> Wish:
        members: list[int] = self.server.status()["membership"]
        empty = [seat for seat in range(SEATS) if seat not in members]
        if empty and (len(members) == 1 or self.rng.random() < 0.5):
            joining = empty[: self.rng.randint(1, len(empty))]
            body: dict[str, Any] = {"new_ep_size": len(members) + len(joining)}
            return Wish(body=body, joining=joining, leaving=[], staying=members)
        leaving = sorted(self.rng.sample(members[1:], self.rng.randint(1, len(members) - 1)))
        staying = [seat for seat in members if seat not in leaving]
        return Wish(body={"retire_seats": leaving}, joining=[], leaving=leaving, staying=staying)

    def _arm(self, wish: Wish) -> str:
        point = self.rng.choice(_UP if wish.joining else _DOWN)
        seats = wish.joining if point in _OF_JOINERS else wish.leaving if point in _OF_LEAVERS else wish.staying
        if point in ("commit.received", "gate.before", "gate.after"):
            seats = [*wish.staying, *wish.leaving]
        seat = self.rng.choice(seats)
        action = self.rng.choice(("self", "self", "hmm", "stall", "raise" if point in _RAISING else "self"))
        words = {"hmm": f"kill:{self._hmm()}", "stall": f"stall:{STALL_S}"}
        arm(self.run_dir, point, seat, words.get(action, action))
        part = "joiner" if seat in wish.joining else "leaver" if seat in wish.leaving else f"seat {min(seat, 1)}"
        return f"{point}: {part.replace('seat 1', 'survivor')} {action}"

    def _kill_somebody(self) -> str:
        time.sleep(self.rng.random())
        status = self.server.status()
        victim = self.rng.choice(("occupied", "occupied", "standby", "hmm"))
        pids = [seat["pid"] for seat in status["seats"] if seat["state"] == victim and seat["pid"] is not None]
        pid = self._hmm() if victim == "hmm" else self.rng.choice(pids or [None])
        if pid is None:
            return "nobody there to kill"
        with suppress(ProcessLookupError):  # it has left meanwhile
            os.kill(pid, signal.SIGKILL)
            self.killed = pid
        return f"at random: {victim} killed"

    def _hmm(self) -> int | None:
        pid: int | None = self.server.status()["memory"]["pid"]
        return pid


@pytest.fixture
def storm(tmp_path: Path, seed: int | None) -> Iterator[Storm]:
    model = make_tiny_model(tmp_path / "model", arch="qwen3_moe")
    args = ["--page-size", "4", "--max-running-requests", str(6 * SEATS)]
    with ElasticServer(model, args, log=tmp_path / "server.log", env={ENV_FAULTS: "1"}) as server:
        run_dir = Path(server.status()["memory"]["endpoint"].removeprefix("ipc://")).parent
        yield Storm(server=server, run_dir=run_dir, rng=random.Random(CHANGES if seed is None else seed))


@pytest.mark.timeout(6000)
def test_many_changes_with_faults_at_random(storm: Storm, changes: int | None, seed: int | None) -> None:
    """`--changes` and `--seed` set how many and which."""
    started = time.monotonic()
    server, rng = storm.server, storm.rng
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.choice((1, 5, 30, 120, 300)))] for _ in range(24)]
    with Load(server.url) as load:
        chaos = Chaos(cases=ask(load, prompts, TOKENS), rng=random.Random(rng.random()))
        with Pump(load, chaos.request, STREAMS):
            for size in (4, 1, 2):  # every seat was used once before anything is counted
                change(server, size)
        before = rest(server, load)
        with Pump(load, chaos.request, STREAMS):
            for _ in range(changes or CHANGES):
                storm.one()
            if server.status()["membership"] != [0, 1]:
                change(server, 4)
                ask_for(server, {"retire_seats": [2, 3], "wait": True})
        after = rest(server, load)
        chaos.check(load)
    found = {
        "changes": storm.phases.total(),
        "ended_as": dict(sorted(storm.phases.items())),
        "faults": dict(sorted(storm.faults.items())),
        "faults_total": storm.faults.total(),
        "whole_again_s_max": round(max(storm.whole_s), 2),
        **load.summary(),
        "memory_growth_mib": round((after.proportional_bytes - before.proportional_bytes) / 2**20, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(found)
    after.check(before)
    leaves_nothing(server, after)
    record("fault-storm", f"seed {CHANGES if seed is None else seed}, {changes or CHANGES} changes", found)
