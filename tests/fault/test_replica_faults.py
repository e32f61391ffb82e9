"""A rank of a replica of two ranks dies or stalls at every point of a change: tokens stay right, and all come back.

Ranks 0 and 1, 2 and 3, 4 and 5 are replicas; changes are 6 -> 4 and 4 -> 6 under load.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_sglang.faults import ENV_FAULTS
from elasticmoe_sglang.tiny_model import VOCAB, make_tiny_model
from tests.helpers.corpus import Case, ask, plain_server
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import arm, armed, ask_for, change, disarm, whole
from tests.helpers.load import Load, Stream, settled
from tests.helpers.shared import COLLECTIVE_DEADLINE_S

pytestmark = [pytest.mark.server, pytest.mark.soak, pytest.mark.timeout(900)]

TOKENS = 96
CASES = 12
SETTLED_S = 60.0


@dataclass
class Served:
    server: ElasticServer
    load: Load
    run_dir: Path
    cases: list[Case]
    rng: random.Random = field(default_factory=lambda: random.Random(3))

    def streams(self, count: int) -> list[tuple[Stream, Case]]:
        chosen = [self.rng.choice(self.cases) for _ in range(count)]
        sent = [(self.load.start(case.prompt, len(case.ids)), case) for case in chosen]
        for stream, _ in sent[:6]:
            stream.wait_for_tokens(4, 60)
        return sent

    def check(self, sent: list[tuple[Stream, Case]], size: int) -> None:
        """All requests have their tokens, and the server is whole with this size."""
        self.load.wait([stream for stream, _ in sent])
        for stream, case in sent:
            stream.check(case.ids)
        settled(lambda: whole(self.server) and self.server.status()["ep_size"] == size, SETTLED_S, f"{size} ranks")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, rng = tmp_path_factory.mktemp("replicas"), random.Random(9)
    with plain_server(folder, "qwen3_moe") as plain, Load(plain.url) as load:
        prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.choice((8, 40, 150, 300)))] for _ in range(2 * CASES)]
        cases = ask(load, prompts, TOKENS)[:CASES]
    run_dir = folder / "run"
    args = ["--elasticmoe-attention-tp", "2", "--elasticmoe-standbys", "2", "--elasticmoe-run-dir", str(run_dir)]
    args += ["--elasticmoe-collective-deadline", str(COLLECTIVE_DEADLINE_S)]
    args += ["--max-running-requests", "12", "--chunked-prefill-size", "192"]
    model = make_tiny_model(folder / "model", arch="qwen3_moe")
    with (
        ElasticServer(model, args, log=folder / "server.log", ep_size=6, capacity=6, env={ENV_FAULTS: "1"}) as server,
        Load(server.url) as load,
    ):
        yield Served(server, load, run_dir, cases)


@pytest.mark.parametrize(
    ("size", "point", "rank", "ends"),
    [
        (4, "barrier.before", 1, ("rolled_back", "failed")),
        (4, "barrier.before", 3, ("rolled_back", "failed")),
        (4, "barrier.after", 5, ("done",)),
        (4, "retire.sending", 4, ("done",)),
        (4, "retire.sent", 4, ("done",)),
        (4, "resume.before", 1, ("done",)),
        (4, "resume.before", 2, ("done",)),
        (4, "resume.before", 3, ("done",)),
        (6, "boot.attached", 5, ("rolled_back",)),
        (6, "boot.barrier", 5, ("rolled_back",)),
        (6, "barrier.before", 0, ("rolled_back", "failed")),
        (6, "barrier.after", 5, ("done",)),
        (6, "spread.given", 3, ("done",)),
    ],
)
def test_a_rank_dies_during_a_change(served: Served, size: int, point: str, rank: int, ends: tuple[str, ...]) -> None:
    """What was decided holds: after the commit the change is done. One that cannot reach a dying worker any more, to
    undo a step, may say that it has failed; the step is done again."""
    server = served.server
    before = 10 - size
    if server.status()["ep_size"] != before:
        change(server, before)
    settled(lambda: whole(server), SETTLED_S, "whole before the change")
    sent = served.streams(2 * CASES)
    try:
        arm(served.run_dir, point, rank, "self")
        operation = ask_for(server, {"new_ep_size": size, "wait": True})
        assert operation["phase"] in ends, operation["error"]
        served.check(sent, size if operation["phase"] == "done" else before)
        assert not armed(served.run_dir), "the fault did not happen"
    finally:
        disarm(served.run_dir)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("ranks", [(0,), (1,), (2,), (3,), (2, 5)])
def test_ranks_die_or_stall(served: Served, how: signal.Signals, ranks: tuple[int, ...]) -> None:
    server = served.server
    if server.status()["ep_size"] != 6:
        change(server, 6)
    settled(lambda: whole(server), SETTLED_S, "whole before the fault")
    pids, sent = server.worker_pids(), served.streams(CASES)
    for rank in ranks:
        os.kill(pids[rank], how)
    served.check(sent, 6)
    replaced: set[Any] = {rank for rank, pid in server.worker_pids().items() if pid != pids[rank]}
    assert replaced == {mate for rank in ranks for mate in (rank // 2 * 2, rank // 2 * 2 + 1)}
