"""Columns placed by how many tokens are routed to them, on the real server: tokens stay, ranks get equal shares."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_sglang.faults import ENV_FAULTS
from elasticmoe_sglang.tiny_model import VOCAB, make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import arm, armed, imbalance, whole
from tests.helpers.load import Load, Pump, Stream, settled

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

TOKENS = 48
PROMPTS = 12
SKEW = 1.5
"""With it the first half of the experts gets about four fifths of the tokens."""


@dataclass(frozen=True, kw_only=True)
class Served:
    server: ElasticServer
    run_dir: Path
    prompts: list[list[int]]
    answers: list[list[int]]

    def start(self, load: Load) -> Stream:
        return load.start(self.prompts[len(load.streams) % PROMPTS], TOKENS)

    def check(self, streams: list[Stream]) -> None:
        """Greedy tokens are those of the server before any change."""
        known = {tuple(prompt): answer for prompt, answer in zip(self.prompts, self.answers, strict=True)}
        for stream in streams:
            stream.check(known[tuple(stream.prompt)])

    def rebalance(self, **body: Any) -> dict[str, Any]:
        response = self.server.post("/elastic_ep/rebalance", {"observe_s": 4.0, "wait": True, **body})
        assert response.status_code == 200, f"{response.status_code}: {response.text}"
        answer: dict[str, Any] = response.json()
        return answer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("skewed")
    model = make_tiny_model(folder / "model", arch="glm4_moe", skew=SKEW)
    run_dir = folder / "run"
    args = ["--elasticmoe-run-dir", str(run_dir), "--disable-radix-cache"]
    rng = random.Random(5)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.choice((3, 20, 60)))] for _ in range(PROMPTS)]
    with ElasticServer(model, args, log=folder / "server.log", env={ENV_FAULTS: "1"}) as server:
        with Load(server.url) as load:
            streams = [load.start(prompt, TOKENS) for prompt in prompts]
            load.wait(streams)
        yield Served(server=server, run_dir=run_dir, prompts=prompts, answers=[stream.ids for stream in streams])


def test_columns_follow_the_tokens(served: Served) -> None:
    server = served.server
    before = server.status()
    with Load(server.url) as load:
        with Pump(load, served.start, 6) as pump:
            settled(lambda: len(pump.streams) > 6, 60, "requests have ended")
            planned = served.rebalance(dry_run=True)
            assert planned["operation"] is None and server.status()["placement"] == before["placement"]
            assert planned["imbalance"] > 1.3 and planned["columns"] > 0, planned

            done = served.rebalance()
            operation = done["operation"]
            assert operation["phase"] == "done", operation
            assert operation["columns_moved"] == done["columns"] and operation["bytes_moved"] > 0
            assert operation["ranks_after"] == operation["ranks_before"] == before["membership"]
            assert done["expected_imbalance"] < 1.1 < done["imbalance"], done

            after = server.status()
            assert after["epoch"] == before["epoch"] + 1 and after["placement"] != before["placement"]
            assert sorted(after["placement"]) == sorted(before["placement"]), "as many columns as before on each rank"
            seen = served.rebalance(dry_run=True)
            found = [done["imbalance"], seen["imbalance"], done["expected_imbalance"]]
            print("imbalance before, after and expected:", [round(each, 2) for each in found])
            assert seen["imbalance"] < 1 + (done["imbalance"] - 1) / 2, "what was expected has come true"
        load.wait(pump.streams)
    served.check(pump.streams)
    assert imbalance(server.status()) is None, imbalance(server.status())


def test_sizes_change_afterwards(served: Served) -> None:
    with Load(served.server.url) as load:
        with Pump(load, served.start, 6) as pump:
            for size in (3, 1, 2):
                served.server.must_scale(size)
        load.wait(pump.streams)
    served.check(pump.streams)
    assert imbalance(served.server.status()) is None, imbalance(served.server.status())


def test_a_rank_dies_while_it_pulls(served: Served) -> None:
    server = served.server
    epoch = server.status()["epoch"]
    with Load(server.url) as load:
        with Pump(load, served.start, 6) as pump:
            settled(lambda: len(pump.streams) > 6, 60, "requests have ended")
            arm(served.run_dir, "pull.started", 1, "self")
            ended = served.rebalance()["operation"]
            assert not armed(served.run_dir)
            # Whichever is known first: the worker's end, or that the others miss it in a collective.
            assert ended["phase"] == "rolled_back" and ended["error"].endswith("meanwhile"), ended
            settled(lambda: whole(server), 90, "the server is whole")
        load.wait(pump.streams)
    served.check(pump.streams)
    assert server.status()["epoch"] > epoch
    assert imbalance(server.status()) is None, imbalance(server.status())


def test_the_command(served: Served) -> None:
    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", "rebalance", *words]
        return subprocess.run([*command, "--url", served.server.url], capture_output=True, text=True, timeout=60)

    idle = cli("--observe", "0.2")
    assert idle.returncode == 2 and "too few to tell" in idle.stderr and "Traceback" not in idle.stderr
    with Load(served.server.url) as load:
        with Pump(load, served.start, 6) as pump:
            settled(lambda: len(pump.streams) > 6, 60, "requests have ended")
            shown = cli("--observe", "4", "--dry-run")
            assert shown.returncode == 0 and "routed tokens seen" in shown.stdout and "a dry run" in shown.stdout
            done = cli("--observe", "4", "--least-gain", "0", "--wait", "--json")
            assert done.returncode == 0, done.stderr
            answer = json.loads(done.stdout)
            assert answer["operation"] is None or answer["operation"]["phase"] == "done"
        load.wait(pump.streams)
    served.check(pump.streams)
