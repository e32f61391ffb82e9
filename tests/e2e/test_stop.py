"""A server is stopped in an ordinary way: what runs is answered, then everything ends, soon and without a complaint.

Supervisors send SIGTERM to the main process or to its whole group; Ctrl-C in a terminal is a SIGINT to the group.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.load import Load, settled

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

PROMPT = list(range(5, 40))
TOKENS = 300
ENDS_WITHIN_S = 2.0
BUDGET = 256 << 20
ALARMING = ("ERROR", "CRITICAL", "Traceback", "Error:", "crashed", "SIGQUIT", "Restart", "HMM ready", "leaked")
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"levels": {"format": "[%(asctime)s] %(levelname)s %(message)s"}},
    "handlers": {"log": {"class": "logging.StreamHandler", "formatter": "levels"}},
    "root": {"handlers": ["log"], "level": "INFO"},
}
"""SGLang's own format leaves the level out."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """`apart`: the HMM is run apart from the server."""

    number: signal.Signals
    group: bool
    apart: bool

    @property
    def id(self) -> str:
        return f"{self.number.name}-{'group' if self.group else 'main'}"

    def stop(self, pid: int) -> None:
        (os.killpg if self.group else os.kill)(pid, self.number)


WAYS = (
    Way(number=signal.SIGTERM, group=True, apart=True),
    Way(number=signal.SIGINT, group=True, apart=False),
    Way(number=signal.SIGTERM, group=False, apart=False),
    Way(number=signal.SIGINT, group=False, apart=True),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("stop") / "model", arch="qwen3_moe")


@contextlib.contextmanager
def sidecar(folder: Path) -> Iterator[HmmClient]:
    endpoint = f"ipc://{folder}/h/hmm.sock"
    with spawn_hmm(endpoint, [BUDGET] * 4) as process, HmmClient(endpoint, name="test") as client:
        yield client
        assert process.alive()


@pytest.mark.parametrize(
    "way", [pytest.param(way, id=way.id, marks=() if way in WAYS[:2] else pytest.mark.soak) for way in WAYS]
)
def test_a_stop_is_quiet_and_soon(way: Way, model: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        hmm = stack.enter_context(sidecar(tmp_path)) if way.apart else None
        args = [] if hmm is None else ["--elasticmoe-hmm-endpoint", hmm.endpoint]
        (tmp_path / "logging.json").write_text(json.dumps(LOGGING))
        env = {"SGLANG_LOGGING_CONFIG_PATH": str(tmp_path / "logging.json")}
        server = stack.enter_context(ElasticServer(model, args, log=tmp_path / "log", env=env))
        load = stack.enter_context(Load(server.url))
        tree = [psutil.Process(server.pid), *server.processes()]
        imm = re.search(r"IMM ready at (\S+)/imm\.sock", server.log.read_text(errors="replace"))
        assert imm is not None
        run_dir = Path(imm[1])
        assert run_dir.is_dir()
        # After such a request SGLang has an entry that it never removes, and would wait for.
        samples = {"input_ids": PROMPT, "sampling_params": {"n": 2, "max_new_tokens": 4}, "stream": True}
        assert server.post("/generate", samples).status_code == 200
        streams = [load.start(PROMPT, TOKENS) for _ in range(2)]
        for stream in streams:
            stream.wait_for_tokens(4, 60)
        held = _held(hmm)
        before = server.log.read_text(errors="replace")
        way.stop(server.pid)
        load.wait(streams, 120)
        settled(lambda: not any(map(_runs, tree)), 20, "every process has ended")
        took_s = time.time() - max(stream.ended_at for stream in streams)
        said = server.log.read_text(errors="replace")[len(before) :]
        print(f"{way.id}: ended {took_s:.2f} s after the last request\n{said}")
        for stream in streams:
            stream.check()
            assert len(stream.ids) == TOKENS
        assert took_s < ENDS_WITHIN_S
        assert [line for line in said.splitlines() if any(word in line for word in ALARMING)] == []
        settled(lambda: not run_dir.exists(), 5, "the run folder is gone")
        if hmm is not None:
            settled(lambda: [c.name for c in hmm.status().clients] == ["test"], 5, "no process is attached")
            status = hmm.status()
            assert not status.txns and status.counters.internal_errors == 0
            assert _held(hmm) == held, "weights stay"
    _check_one_line_a_process(before)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _held(hmm: HmmClient | None) -> list[dict[str, int]]:
    """Bytes of weights on each device."""
    if hmm is None:
        return []
    return [{k: n for k, n in device.by_kind.items() if k in ("column", "dense")} for device in hmm.status().devices]


def _check_one_line_a_process(log: str) -> None:
    """The log of the start says once in each process what is in place, and nothing a hook or a model file."""
    lines = [line for line in log.splitlines() if " hooks in SGLang " in line]
    assert all("memory backend cpu" in line for line in lines)
    said = Counter(line.split(" hooks in SGLang ")[0].split()[-2] for line in lines)
    assert said == {"main:": 1, "dpc:": 1, "standby:": 1, "worker:": 2}
    assert "Applied " not in log and "Ignore import error" not in log
