"""The coordinator dies in each phase of a change, and with it the server, whose process it shares.

What is left is the HMM, run apart: it rolls the open transaction back, and the server that is started next finds memory
that is whole, answers as before and changes its size. Streams end with the process that held their connections: those
are the requests this row of the fault matrix loses, and a client has to send them again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from elasticmoe_sglang.faults import ENV_FAULTS
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import arm, armed, change, imbalance
from tests.helpers.load import Load, settled
from tests.helpers.record import record

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

BUDGET = 256 << 20
PROMPT = list(range(5, 40))
TOKENS = 400
GONE_WITHIN_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Death:
    """When the server is killed: `rank` reaches `point` in a change between these sizes."""

    start: int
    end: int
    phase: str
    point: str
    rank: int

    @property
    def id(self) -> str:
        return f"{self.start}->{self.end}-{self.phase}-coordinator-{self.point}"


DEATHS = (
    Death(start=2, end=4, phase="committing", point="commit.received", rank=1),
    Death(start=2, end=4, phase="preparing", point="boot.attached", rank=2),
    Death(start=2, end=4, phase="finishing", point="barrier.after", rank=1),
    Death(start=4, end=2, phase="preparing", point="pull.started", rank=1),
    Death(start=4, end=2, phase="committing", point="barrier.before", rank=3),
    Death(start=4, end=2, phase="finishing", point="retire.sent", rank=3),
)


@dataclass(frozen=True, kw_only=True)
class Site:
    """An HMM that outlives servers, a model, and what it answers."""

    hmm: HmmClient
    model: Path
    logs: Path
    expected: list[int]

    def alone(self) -> bool:
        """No process of any server is attached to the HMM."""
        return [client.name for client in self.hmm.status().clients] == ["test"]

    def server(self, name: str, run_dir: Path) -> ElasticServer:
        args = ["--elasticmoe-hmm-endpoint", self.hmm.endpoint, "--elasticmoe-run-dir", str(run_dir)]
        return ElasticServer(self.model, args, log=self.logs / name, env={ENV_FAULTS: "1"})


@pytest.fixture
def run_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="em-"))  # a short path: it holds sockets
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    model = make_tiny_model(folder / "model", arch="qwen3_moe")
    with ElasticServer(model, log=folder / "reference.log") as server:
        expected = server.generate(PROMPT, TOKENS)["output_ids"]
    endpoint = f"ipc://{folder}/h/hmm.sock"
    with spawn_hmm(endpoint, [BUDGET] * 4) as process, HmmClient(endpoint, name="test") as client:
        yield Site(hmm=client, model=model, logs=folder, expected=expected)
        assert process.alive()


@pytest.mark.parametrize(
    "death",
    [pytest.param(death, id=death.id, marks=() if death is DEATHS[0] else pytest.mark.soak) for death in DEATHS],
)
def test_a_new_server_goes_on_from_the_memory(site: Site, run_dir: Path, death: Death) -> None:
    with site.server("first.log", run_dir) as server, Load(server.url) as load:
        if death.start != 2:
            change(server, death.start)
        streams = [load.start(PROMPT, TOKENS) for _ in range(4)]
        for stream in streams:
            stream.wait_for_tokens(4, 60)
        arm(run_dir, death.point, death.rank, f"kill:{server.pid}")
        server.scale(death.end, wait=False)
        settled(lambda: not armed(run_dir), 30, f"{death.id} happens")
        died = time.monotonic()
        settled(site.alone, GONE_WITHIN_S, "every process has ended")
        gone_s = time.monotonic() - died
        load.wait(streams, GONE_WITHIN_S)
    status = site.hmm.status()
    assert not status.txns and status.counters.internal_errors == 0
    for stream in streams:
        assert stream.error is not None, "its server was killed"
        assert stream.ids == site.expected[: len(stream.ids)] and not stream.problems

    shutil.rmtree(run_dir)
    run_dir.mkdir()
    with site.server("second.log", run_dir) as server:
        read = sum(rank["checkpoint_bytes"] for rank in server.status()["ranks"] if rank["state"] == "active")
        assert server.generate(PROMPT, TOKENS)["output_ids"] == site.expected
        settled(lambda: imbalance(server.status()) is None, 10, "the ledger has what the placement says")
        change(server, 4)
        change(server, 2)
        settled(lambda: imbalance(server.status()) is None, 10, "the ledger agrees after two changes")
    assert read == 0, "a server on a living HMM reads no weights"
    found = {"gone_s": round(gone_s, 2), "boot_s": round(server.boot_s, 1), "streams_broken": len(streams)}
    print(death.id, found)
    record("fault-matrix", death.id, found)
