"""Servers that tests of several files share, because starting one takes longer than most of these tests.

At most one of them runs. `tests/conftest.py` puts tests that are marked `shared` with the same name next to each other.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from elasticmoe_sglang.faults import ENV_FAULTS
from elasticmoe_sglang.tiny_model import VOCAB, Arch, Quantization, make_tiny_model
from tests.helpers.corpus import REASONING, Case, ask, plain_server
from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.faults import SETTLED_WITHIN_S, ask_for, change, whole
from tests.helpers.load import Load, Stream, settled
from tests.helpers.restarts import Site
from tests.helpers.server import ServerFailed, SglangServer

KEY = "open-sesame"
"""The admin key of the steady server."""
SLOTS = 4
"""Requests that run together on one rank; what comes on top waits in its queue."""
CHUNK = 64
"""Tokens of one prefill step on one rank: a long prompt takes ten of them."""
LIMITS = ("--max-running-requests", str(SLOTS * RANKS), "--chunked-prefill-size", str(CHUNK * RANKS))
STRICT = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1"}
"""SGLang's own checks of its memory pools, after every batch and when idle; one that fails ends the worker."""
EXPERTS = 16
ROOM = 12
"""Columns that fit a device of the faulty server beside the dense weights: one rank alone cannot hold all."""
FAULTY_TOKENS = 96
LENGTHY = (300, 600, 1000, 1400)
"""Prompts, in tokens, of requests that keep the faulty server's queues from being empty."""
FAULTY_LIMITS = ("--max-running-requests", str(SLOTS * RANKS), "--chunked-prefill-size", str(4 * CHUNK * RANKS))
LENGTHY_TOKENS = 12
COLLECTIVE_DEADLINE_S = 15
"""Of the faulty server: tests wait for it."""


@dataclass
class Faulty:
    """A server in which faults can be armed, with prompts and the tokens that must follow."""

    server: ElasticServer
    load: Load
    cases: list[Case]
    run_dir: Path
    lengthy: list[Case]
    rng: random.Random = field(default_factory=lambda: random.Random(3))
    expected: dict[str, list[int]] = field(default_factory=dict)

    def request(self, load: Load) -> Stream:
        return self._start(load, self.rng.choice(self.cases), self.rng.randint(FAULTY_TOKENS // 2, FAULTY_TOKENS))

    def lengthy_request(self, load: Load) -> Stream:
        """A long prompt and few tokens. No two have a prefix in common in the cache."""
        return self._start(load, self.rng.choice(self.lengthy), LENGTHY_TOKENS, extra_key=str(self.rng.random()))

    def _start(self, load: Load, case: Case, tokens: int, **fields: str) -> Stream:
        stream = load.start(case.prompt, tokens, **fields)
        self.expected[stream.rid] = case.ids
        return stream

    def at_two(self) -> None:
        """Ranks 0 and 1 are active, a standby waits, nobody is missing."""
        settled(lambda: whole(self.server), SETTLED_WITHIN_S, "the server is whole")
        if self.server.status()["membership"] != [0, 1]:
            if len(self.server.status()["membership"]) != RANKS:
                change(self.server, RANKS)
            operation = ask_for(self.server, {"retire_ranks": [2, 3], "wait": True})
            assert operation["phase"] == "done", operation["error"]
        settled(lambda: standby_pid(self.server) is not None, 60, "a standby")


def standby_pid(server: ElasticServer) -> int | None:
    pids = [rank["pid"] for rank in server.status()["ranks"] if rank["state"] == "standby"]
    return pids[0] if pids else None


class Shared:
    """The servers by name. Each is started when it is first asked for, and ended when another one is."""

    def __init__(self, make_folder: Callable[[str], Path]) -> None:
        self._make_folder = make_folder
        self._stack = ExitStack()
        self._name = ""
        self._held: Any = None
        self._failed: dict[str, str] = {}

    def close(self) -> None:
        self._name, self._held = "", None
        self._stack.close()

    def _get(self, name: str, start: Callable[[Path], AbstractContextManager[Any]]) -> Any:
        server = self._held if isinstance(self._held, SglangServer) else getattr(self._held, "server", None)
        # A test may have ended it: the next one then gets another, so that one failure does not become many.
        ended = isinstance(server, SglangServer) and not server.running
        if self._name == name and not ended:
            return self._held
        self.close()
        if name in self._failed:
            raise ServerFailed(f"the server did not start before: {self._failed[name]}")
        try:
            self._held = self._stack.enter_context(start(self._make_folder(name.replace(" ", "-"))))
        except Exception as error:
            self._failed[name] = str(error)
            raise
        self._name = name
        return self._held

    def plain(self, arch: Arch, quantization: Quantization | None = None) -> SglangServer:
        """Plain SGLang, one rank, no flag of ours."""
        name = f"plain {arch}{f' {quantization}' if quantization else ''}"
        server: SglangServer = self._get(name, lambda folder: plain_server(folder, arch, quantization))
        return server

    def steady(self) -> ElasticServer:
        """Two of four ranks, small pages, SGLang's checks on, an admin key: for everything that kills nothing."""
        server: ElasticServer = self._get("steady", _steady)
        status = server.status()
        if status["running"]:
            server.ended(status["running"]["operation_id"])
        if server.status()["membership"] != [0, 1]:
            server.must_scale(1)
            server.must_scale(2)
        return server

    def faulty(self) -> Faulty:
        """Two of four ranks, no room for all columns on one device; SGLang's metrics are on."""
        faulty: Faulty = self._get("faulty", faulty_server)
        return faulty

    def site(self) -> Site:
        """An HMM that outlives servers."""
        site: Site = self._get("site", Site.opened)
        return site


@contextmanager
def _steady(folder: Path) -> Iterator[ElasticServer]:
    model = make_tiny_model(folder / "model", experts=EXPERTS)
    args = [*LIMITS, "--page-size", "4", "--admin-api-key", KEY, *REASONING]
    with ElasticServer(model, args, log=folder / "server.log", env=STRICT, admin_key=KEY) as server:
        yield server


@contextmanager
def faulty_server(folder: Path, args: tuple[str, ...] = ()) -> Iterator[Faulty]:
    """Args:
    args: more flags.
    """
    run_dir = Path(tempfile.mkdtemp(prefix="em-"))  # a short path: it holds sockets
    model = make_tiny_model(folder / "model", experts=EXPERTS)
    budget = dense_bytes(model) + ROOM * column_bytes(model) + column_bytes(model) // 2
    rng = random.Random(11)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.choice((2, 17, 64)))] for _ in range(20)]
    lengthy = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in LENGTHY * 2]
    own = ["--elasticmoe-run-dir", str(run_dir), "--elasticmoe-device-budget", str(budget)]
    own += ["--elasticmoe-collective-deadline", str(COLLECTIVE_DEADLINE_S), *REASONING, "--enable-metrics"]
    own += [*FAULTY_LIMITS, *args]
    try:
        with (
            ElasticServer(model, own, log=folder / "server.log", env={ENV_FAULTS: "1"}) as server,
            Load(server.url) as load,
        ):
            cases, long_cases = ask(load, prompts, FAULTY_TOKENS), ask(load, lengthy, LENGTHY_TOKENS)
            yield Faulty(server=server, load=load, cases=cases, lengthy=long_cases, run_dir=run_dir)
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


def dense_bytes(model: Path) -> int:
    """Bytes of everything that is not a routed expert."""
    return sum(nbytes for name, nbytes in tensor_bytes(model).items() if ".experts." not in name)


def column_bytes(model: Path) -> int:
    """Bytes of one routed expert over all layers, scales or biases included, as a column has them."""
    experts = json.loads((model / "config.json").read_text()).get("num_local_experts")
    sizes = tensor_bytes(model)
    if experts is None:
        return sum(nbytes for name, nbytes in sizes.items() if ".experts.0." in name)
    return sum(nbytes for name, nbytes in sizes.items() if ".experts." in name) // int(experts)


def tensor_bytes(model: Path) -> dict[str, int]:
    """Bytes of each tensor of the checkpoint, by name."""
    with safe_open(model / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 (it is no dict)
