"""An HMM that outlives servers, and one server after the other on it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elasticmoe_sglang.faults import ENV_FAULTS
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.page_cache import drop, resident

BUDGET = 1 << 30
HIDDEN = 1024
"""About 430 MiB of weights: reading them takes longer than building the modules."""
PROMPT = list(range(5, 40))


@dataclass(frozen=True, kw_only=True)
class Start:
    """What one start of a server read.

    Attributes:
        read_bytes: of tensors, by all ranks.
        load_s: of the slowest rank.
        resident_bytes: of the checkpoint, in the kernel's cache afterwards; None where it cannot be emptied before.
        answer: tokens that follow PROMPT.
    """

    read_bytes: int
    load_s: float
    boot_s: float
    resident_bytes: int | None
    answer: list[int]


class Site:
    """The HMM, a model, and the server that runs on them now."""

    def __init__(self, hmm: HmmClient, model: Path, logs: Path, run_dir: Path) -> None:
        self.hmm = hmm
        self.model = model
        self.weights = model / "model.safetensors"
        self.starts: list[Start] = []
        """Of all servers so far; the first one found no weights in the HMM."""
        self.run_dir = run_dir
        self._logs = logs
        self._server: ElasticServer | None = None

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[Site]:
        model = make_tiny_model(folder / "model", hidden=HIDDEN)
        endpoint = f"ipc://{folder}/h/hmm.sock"
        with (
            tempfile.TemporaryDirectory(prefix="em-", ignore_cleanup_errors=True) as short,  # it holds sockets
            spawn_hmm(endpoint, [BUDGET] * 4) as process,
            HmmClient(endpoint, name="test") as client,
        ):
            site = cls(client, model, folder, Path(short, "run"))
            try:
                yield site
            finally:
                site.stop()
            assert process.alive()

    def alone(self) -> bool:
        """No process of any server is attached to the HMM."""
        return [client.name for client in self.hmm.status().clients] == ["test"]

    def running(self) -> ElasticServer:
        """The server, with two ranks; started where the one before has ended."""
        if self._server is None or not self._server.running:
            return self.next()
        if self._server.status()["membership"] != [0, 1]:
            self._server.must_scale(4)
            self._server.must_scale(retire=[2, 3])
        return self._server

    def next(self) -> ElasticServer:
        """Another server in an empty run folder, started while the checkpoint is in no cache."""
        self.stop()
        drop(self.weights)
        droppable = resident(self.weights) == 0
        server = self.server(self.model, f"server-{len(self.starts)}.log")
        server.__enter__()
        self._server = server
        read_bytes, load_s = loading(server.status())
        touched = resident(self.weights) if droppable else None
        answer = server.generate(PROMPT, 24)["output_ids"]
        self.starts.append(
            Start(
                read_bytes=read_bytes,
                load_s=load_s,
                boot_s=server.boot_s,
                resident_bytes=touched,
                answer=answer,
            )
        )
        return server

    def server(self, model: Path, log: str) -> ElasticServer:
        """One that is not started."""
        shutil.rmtree(self.run_dir, ignore_errors=True)
        self.run_dir.mkdir()
        args = ["--elasticmoe-hmm-endpoint", self.hmm.endpoint, "--elasticmoe-run-dir", str(self.run_dir)]
        return ElasticServer(model, args, log=self._logs / log, env={ENV_FAULTS: "1"})

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


def loading(status: dict[str, Any]) -> tuple[int, float]:
    """Bytes of tensors that the ranks read of the checkpoint, and the load time in seconds of the slowest."""
    ranks = [rank for rank in status["ranks"] if rank["state"] == "active"]
    return sum(rank["checkpoint_bytes"] for rank in ranks), max(rank["load_s"] for rank in ranks)
