"""SGLang with --device npu on simulated NPUs: what an elastic server does on the CPU, done there.

The real torch_npu and SGLang's NPU path run, with copies that are late; float32 tokens are plain SGLang's on the CPU.
What this says of an NPU, and what it does not, is in tests/helpers/npusim/README.md.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from elasticmoe_sglang.tiny_model import Arch
from tests.e2e.conftest import Corpora
from tests.helpers import npusim
from tests.helpers.corpus import LONG, Case, Corpus
from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.faults import ask_for
from tests.helpers.footprint import named
from tests.helpers.load import Load, Stream, settled
from tests.helpers.npusim import operators
from tests.helpers.shared import LIMITS, Shared, standby_pid

pytestmark = [pytest.mark.server, pytest.mark.timeout(1500)]

STREAMS = 6
WHOLE_WITHIN_S = 240.0
"""A standby imports SGLang and torch_npu anew, for 10 s where nothing else runs."""
NO_BOOT_MS = 2000.0
"""Of preparing, where nothing boots: seen 0.2 to 0.3 s. A boot takes ten."""
_TOKENS = 16384
_BUDGET = "60MiB"
"""Of a device: weights leave room for a part of `_TOKENS`, another part at every size."""
HEADROOM = 0.12
"""What KV leaves of a device by default: 1 - --mem-fraction-static."""
_PAGE = 64 << 10
"""Granularity of device memory: with CANN's 2 MiB a chunk of these models' KV would be all of it."""
_KEPT = 2
"""Standbys that are ready, so that growing by two does not wait for an import."""
SEED = 5
"""Of which copies are late; with 0, of the first server, all of them are."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model, the sizes it goes through, the first one at the start, hot standbys, and variables of the server."""

    arch: Arch = "qwen3_moe"
    sizes: tuple[int, ...] = (2, 3, 1, 4, 2)
    late: int = 0
    hot: int = 0
    variables: Mapping[str, str] = field(default_factory=dict)


SETUPS = (
    pytest.param(Setup(sizes=(1, 2, 1)), id="qwen3_moe-one-round"),
    pytest.param(Setup(), id="qwen3_moe", marks=pytest.mark.soak),
    pytest.param(Setup(arch="deepseek_v2", late=SEED), id="deepseek_v2", marks=pytest.mark.soak),
    pytest.param(
        Setup(late=SEED, variables={"ASCEND_USE_FIA": "1"}), id="qwen3_moe-fused-attention", marks=pytest.mark.soak
    ),
    pytest.param(Setup(sizes=(1, 2, 1, 2), hot=1), id="qwen3_moe-hot-standby", marks=pytest.mark.soak),
    pytest.param(
        Setup(late=SEED, variables=npusim.TRITON_ASCEND), id="qwen3_moe-triton-ascend", marks=pytest.mark.soak
    ),
)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server on simulated NPUs, with the answers of the CPU."""

    setup: Setup
    server: ElasticServer
    corpus: Corpus
    load: Load
    record: Path

    def start(self, rng: random.Random, count: int) -> list[tuple[Stream, Case]]:
        """Requests that have begun to decode."""
        cases = [rng.choice(self.corpus.cases) for _ in range(count)]
        pairs = [(self.load.start(case.prompt, len(case.ids)), case) for case in cases]
        for stream, _ in pairs:
            stream.wait_for_tokens(3, 240)
        return pairs

    def check(self, pairs: list[tuple[Stream, Case]]) -> None:
        """All have ended with the CPU's tokens."""
        self.load.wait([stream for stream, _ in pairs], 600)
        for stream, case in pairs:
            stream.check(case.ids)

    @property
    def members(self) -> list[int]:
        members: list[int] = self.server.status()["membership"]
        return members


@pytest.fixture(scope="module", params=SETUPS)
def running(
    request: pytest.FixtureRequest, shared: Shared, corpora: Corpora, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    setup: Setup = request.param
    python, corpus = npusim.python_or_skip(triton_ascend=setup.variables == npusim.TRITON_ASCEND), corpora[setup.arch]
    shared.close()
    folder = tmp_path_factory.mktemp("npu")
    record = folder / "operators"
    record.mkdir()
    most = max(setup.sizes)
    # SGLang takes a float32 checkpoint for half precision on an accelerator unless told not to.
    args = [*LIMITS, "--dtype", "float32", "--elasticmoe-standbys", str(min(_KEPT, most - 1))]
    args += ["--elasticmoe-device-budget", _BUDGET, "--elasticmoe-hot-standbys", str(setup.hot)]
    with (
        ElasticServer(
            corpus.model,
            args,
            log=folder / "server.log",
            ep_size=setup.sizes[0],
            capacity=most,
            device="npu",
            kv_tokens=_TOKENS,
            python=python,
            env={**npusim.environment(devices=most, late=setup.late, record=record, page=_PAGE), **setup.variables},
        ) as server,
        Load(server.url) as load,
    ):
        yield Running(setup=setup, server=server, corpus=corpus, load=load, record=record)


def test_same_tokens_through_every_change(running: Running) -> None:
    """With streams that decode, among them ones that move with their KV."""
    rng, kept = random.Random(1), 0
    for size in running.setup.sizes[1:]:
        if size > len(running.members) and running.setup.hot:
            settled(lambda: "hot" in states(running), WHOLE_WITHIN_S, "a hot standby")
        pairs = running.start(rng, STREAMS)
        operation = running.server.must_scale(size)
        if running.setup.hot:
            assert operation["timings"]["preparing_ms"] < NO_BOOT_MS
        running.check(pairs + running.start(rng, 2))
        assert len(running.members) == size and operation["columns_moved"] > 0
        moved = [stream for stream, _ in pairs if len(stream.ranks) > 1]
        assert bool(moved) == bool(operation["retiring"])
        kept += operation["moved_requests"] - operation["recomputed_requests"]
    assert kept > 0


def test_a_graph_would_find_everything_where_it_was_captured(running: Running) -> None:
    """SGLang's NPU graphs are refused so far. What they would hold is the same through all those changes."""
    setup = running.setup
    if setup.arch != "qwen3_moe" or "ASCEND_USE_FIA" in setup.variables:
        pytest.skip("its attention is given copies of a cache, or is an operator of whose arguments no record is kept")
    pid = running.server.worker_pids()[0]
    layers = json.loads((running.corpus.model / "config.json").read_text())["num_hidden_layers"]
    found = {name: len(places) for name, places in npusim.addresses(running.record, pid).items()}
    caches = {name: count for name, count in found.items() if name.endswith("_cache")}
    weights = {name: count for name, count in found.items() if name.endswith(".weight")}
    assert len(caches) >= 4 and set(caches.values()) == {layers}, caches
    triton_ascend = setup.variables == npusim.TRITON_ASCEND
    assert set(weights.values()) == ({2 * layers} if triton_ascend else set()), weights


def test_kv_grows_into_what_columns_leave_and_makes_room_for_them(running: Running) -> None:
    if running.setup.arch != "qwen3_moe":
        pytest.skip("all the KV that the server may have fits beside this model's weights")
    seen = {}
    for size in (1, 2, 1):
        if len(running.members) != size:
            running.server.must_scale(size)
        status = running.server.status()
        usage = status["memory"]["devices"][0]
        room = usage["budget"] * (1 - HEADROOM) - usage["by_kind"]["dense"] - usage["by_kind"]["column"]
        assert 0.97 * room < usage["by_kind"]["kv"] <= room
        tokens = status["ranks"][0]["kv_tokens"]
        assert seen.setdefault(size, tokens) == tokens
    assert seen[1] < 0.8 * seen[2]


def test_a_cached_prefix_is_used_after_a_change(running: Running) -> None:
    case = running.corpus.long[0]
    for size in running.setup.sizes[1:3]:
        answers = [running.server.generate(case.prompt, len(case.ids), routed_dp_rank=0) for _ in range(2)]
        assert all(answer["output_ids"] == case.ids for answer in answers)
        assert answers[1]["meta_info"]["cached_tokens"] >= LONG // 2
        running.server.must_scale(size)


def test_operators_are_those_that_the_documents_name(running: Running) -> None:
    """And each was checked as the list says; see `python -m tests.helpers.npusim.operators`."""
    known = operators.listed()
    for name, how in operators.of(running.record).items():
        assert known.get(name) == how, f"{name} ({how}) is not in {operators.PAGE.name}: write it with that command"


@pytest.mark.soak
@pytest.mark.parametrize("victim", ["rank 1", "rank 0", "imm", "joining", "hmm"])
def test_a_process_is_killed(running: Running, victim: str) -> None:
    """No request is lost, and all ranks serve again. After the HMM's death there are no more changes: it comes last.

    CANN lets nobody import memory whose owner has ended, so that another HMM cannot adopt it.
    """
    if max(running.setup.sizes) < RANKS:
        pytest.skip("for the servers with room to grow")
    if len(running.members) != 2:
        running.server.must_scale(2)
    settled(lambda: whole(running, 2), WHOLE_WITHIN_S, "the server is whole before")
    pairs = running.start(random.Random(victim), STREAMS)
    if victim == "joining":
        operation = running.server.scale(3, wait=False)
        os.kill(joining(running, operation["operation_id"]), signal.SIGKILL)
        running.server.ended(operation["operation_id"], WHOLE_WITHIN_S)
    elif victim.startswith("rank"):
        os.kill(running.server.worker_pids()[int(victim[-1])], signal.SIGKILL)
    elif victim == "hmm":
        os.kill(running.server.status()["memory"]["pid"], signal.SIGKILL)
    else:
        names = named(running.server.processes())
        os.kill(next(pid for pid, name in names.items() if name == victim), signal.SIGKILL)
    running.check(pairs)
    if victim == "hmm":
        settled(
            lambda: "which owned this memory, has ended" in refusal(running), 60, "changes are refused with the reason"
        )
        running.check(running.start(random.Random(victim), 4))
        return
    settled(lambda: whole(running, 2), WHOLE_WITHIN_S, "the server is whole again")
    for size in (3, 2):
        settled(lambda: standby_pid(running.server) is not None, WHOLE_WITHIN_S, "a standby")
        pairs = running.start(random.Random(size), 4)
        assert ask_for(running.server, {"new_ep_size": size, "wait": True})["phase"] == "done"
        running.check(pairs)


def refusal(running: Running) -> str:
    """What a request for a change is answered while the HMM does not have its memory."""
    response = running.server.post("/scale_elastic_ep", {"new_ep_size": 3})
    assert response.status_code == 503, response.text
    return response.text


def states(running: Running) -> set[str]:
    return {rank["state"] for rank in running.server.status()["ranks"]}


def whole(running: Running, size: int) -> bool:
    status = running.server.status()
    active = [rank for rank in status["ranks"] if rank["state"] == "active"]
    return status["running"] is None and status["membership"] == status["target_ranks"] and len(active) == size


def joining(running: Running, operation_id: str) -> int:
    found: list[int] = []

    def look() -> bool:
        ranks = running.server.status()["ranks"]
        found[:] = [rank["pid"] for rank in ranks if rank["state"] == "joining" and rank["pid"]]
        return bool(found) or running.server.operation(operation_id)["phase"] not in ("planned", "preparing")

    settled(look, WHOLE_WITHIN_S, "a rank boots")
    assert found, running.server.operation(operation_id)
    return found[0]
