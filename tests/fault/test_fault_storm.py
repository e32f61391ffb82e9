"""Changes with faults injected at random, under load with aborts and disconnects: nothing lost, nothing leaked.

Two of three changes meet a fault: at one of the points of `elasticmoe_sglang/faults.py` a rank is killed, fails, or
stands still for a moment, or it kills the HMM; or at no point in particular a rank, the HMM or a standby is killed. A
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
from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.faults import SETTLED_WITHIN_S, arm, armed, ask_for, change, disarm, imbalance, whole
from tests.helpers.footprint import leaves_nothing, rest
from tests.helpers.load import Load, Pump, settled
from tests.helpers.record import record

pytestmark = [pytest.mark.server, pytest.mark.soak]

CHANGES = 200
STREAMS = 6
FAULTY = 2 / 3
STALL_S = 0.5
_UP = ("boot.attached", "boot.barrier", "commit.received", "barrier.before", "barrier.after")
_DOWN = (
    "pull.started",
    "pull.done",
    "commit.received",
    "barrier.before",
    "barrier.after",
    "retire.sending",
    "retire.sent",
    "resume.before",
)
_OF_JOINING_RANKS, _OF_RETIRING_RANKS = ("boot.attached", "boot.barrier"), ("retire.sending", "retire.sent")
_RAISING = ("boot.attached", "pull.started", "pull.done")
"""Points at which the rank's own code may fail; at the others nothing of a rank's can but its process."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A change, and who has which part in it."""

    body: dict[str, Any]
    joining: list[int]
    retiring: list[int]
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
        target = self._target()
        faulty = self.rng.random() < FAULTY
        aimed = faulty and self.rng.random() < 0.7
        fault = self._arm(target) if aimed else None
        operation = ask_for(self.server, target.body | {"wait": False})
        if faulty and not aimed:
            fault = self._kill_somebody()
        operation = self.server.ended(operation["operation_id"])
        if fault is not None and not armed(self.run_dir):
            self.faults[fault] += 1
        disarm(self.run_dir)
        self.phases[operation["phase"]] += 1
        print(f"{sum(self.phases.values())}: {target.body}, {fault}: {operation['phase']}, {operation['error']}")
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
        pids = {status["memory"]["pid"], *(rank["pid"] for rank in status["ranks"])}
        return self.killed not in pids - {None} and whole(self.server)

    def _target(self) -> Target:
        members: list[int] = self.server.status()["membership"]
        empty = [rank for rank in range(RANKS) if rank not in members]
        if empty and (len(members) == 1 or self.rng.random() < 0.5):
            joining = empty[: self.rng.randint(1, len(empty))]
            body: dict[str, Any] = {"new_ep_size": len(members) + len(joining)}
            return Target(body=body, joining=joining, retiring=[], staying=members)
        retiring = sorted(self.rng.sample(members[1:], self.rng.randint(1, len(members) - 1)))
        staying = [rank for rank in members if rank not in retiring]
        return Target(body={"retire_ranks": retiring}, joining=[], retiring=retiring, staying=staying)

    def _arm(self, target: Target) -> str:
        point = self.rng.choice(_UP if target.joining else _DOWN)
        ranks = (
            target.joining
            if point in _OF_JOINING_RANKS
            else target.retiring
            if point in _OF_RETIRING_RANKS
            else target.staying
        )
        if point in ("commit.received", "barrier.before", "barrier.after"):
            ranks = [*target.staying, *target.retiring]
        rank = self.rng.choice(ranks)
        action = self.rng.choice(("self", "self", "hmm", "stall", "raise" if point in _RAISING else "self"))
        words = {"hmm": f"kill:{self._hmm()}", "stall": f"stall:{STALL_S}"}
        arm(self.run_dir, point, rank, words.get(action, action))
        part = (
            "joining rank"
            if rank in target.joining
            else "retiring rank"
            if rank in target.retiring
            else f"rank {min(rank, 1)}"
        )
        return f"{point}: {part.replace('rank 1', 'survivor')} {action}"

    def _kill_somebody(self) -> str:
        time.sleep(self.rng.random())
        status = self.server.status()
        victim = self.rng.choice(("active", "active", "standby", "hmm"))
        pids = [rank["pid"] for rank in status["ranks"] if rank["state"] == victim and rank["pid"] is not None]
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
    args = ["--page-size", "4", "--max-running-requests", str(6 * RANKS)]
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
            for size in (4, 1, 2):  # every rank was used once before anything is counted
                change(server, size)
        before = rest(server, load)
        with Pump(load, chaos.request, STREAMS):
            for _ in range(changes or CHANGES):
                storm.one()
            if server.status()["membership"] != [0, 1]:
                change(server, 4)
                ask_for(server, {"retire_ranks": [2, 3], "wait": True})
        after = rest(server, load)
        chaos.check(load)
    found = {
        "changes": storm.phases.total(),
        "ended_as": dict(sorted(storm.phases.items())),
        "faults": dict(sorted(storm.faults.items())),
        "faults_total": storm.faults.total(),
        "whole_again_s_max": round(max(storm.whole_s), 2),
        **load.summary(),
        "memory_growth_mib": round((after.memory.total() - before.memory.total()) / 2**20, 1),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(found)
    after.check(before)
    leaves_nothing(server, after)
    record("fault-storm", f"seed {CHANGES if seed is None else seed}, {changes or CHANGES} changes", found)
