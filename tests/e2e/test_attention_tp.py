"""Attention tensor parallelism: replicas of two ranks, whose tokens equal plain SGLang's of one rank (float32).

Replicas join, retire and are lost as a whole while requests decode, are prefilled in chunks, and wait.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from elasticmoe_sglang.tiny_model import VOCAB, Arch
from tests.e2e.conftest import Corpora
from tests.helpers.corpus import REASONING, TOKENS, Case, Corpus, settle, spread
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import SETTLED_WITHIN_S, imbalance, whole
from tests.helpers.load import Load, Stream, settled
from tests.helpers.shared import LIMITS, SLOTS, STRICT, Shared

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

SIZE = 2
"""Ranks of a replica."""
MOST_ROUNDS = 12
_NO_OVERLAP = "--disable-overlap-schedule"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One server's model and flags."""

    arch: Arch
    args: tuple[str, ...] = ()


SETUPS = (
    pytest.param(Setup(arch="qwen3_moe"), id="qwen3_moe"),
    pytest.param(Setup(arch="deepseek_v2"), id="deepseek_v2", marks=pytest.mark.soak),
    pytest.param(Setup(arch="deepseek_v3"), id="deepseek_v3", marks=pytest.mark.soak),
    pytest.param(Setup(arch="qwen2_moe"), id="qwen2_moe", marks=pytest.mark.soak),
    pytest.param(Setup(arch="glm4_moe"), id="glm4_moe", marks=pytest.mark.soak),
    pytest.param(Setup(arch="gpt_oss"), id="gpt_oss", marks=pytest.mark.soak),
    pytest.param(
        Setup(arch="qwen3_moe", args=("--page-size", "16", _NO_OVERLAP)),
        id="qwen3_moe-paged-no-overlap",
        marks=pytest.mark.soak,
    ),
    pytest.param(
        Setup(arch="qwen3_moe", args=("--elasticmoe-hot-standbys", "2")), id="qwen3_moe-hot", marks=pytest.mark.soak
    ),
)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server of two replicas, one of them active, with the answers that are right for its model."""

    server: ElasticServer
    corpus: Corpus
    load: Load

    def wave(self, seed: int, size: int) -> list[tuple[Stream, Case]]:
        """On `size` replicas: requests that decode, that are prefilled in chunks, and that wait."""
        rng = random.Random(seed)
        sent = [self._send(rng.choice(self.corpus.cases), TOKENS) for _ in range(size * (SLOTS - 1))]
        for stream, _ in sent:
            stream.wait_for_tokens(4, 60)
        for _ in range(size):
            sent.append(self._send(rng.choice(self.corpus.long), 16, extra_key=uuid.uuid4().hex))
            sent += [self._send(rng.choice(self.corpus.cases), 20) for _ in range(2)]
        return sent

    def _send(self, case: Case, tokens: int, **fields: Any) -> tuple[Stream, Case]:
        return self.load.start(case.prompt, tokens, **fields), case

    def check(self, sent: list[tuple[Stream, Case]]) -> None:
        self.load.wait([stream for stream, _ in sent])
        for stream, case in sent:
            stream.check(case.ids)


@pytest.fixture(scope="module", params=SETUPS)
def running(
    request: pytest.FixtureRequest, shared: Shared, corpora: Corpora, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    setup: Setup = request.param
    corpus = corpora[setup.arch]
    shared.close()
    log = tmp_path_factory.mktemp("server") / "server.log"
    own = ["--elasticmoe-attention-tp", str(SIZE), "--elasticmoe-standbys", str(SIZE)]
    with (
        ElasticServer(corpus.model, [*LIMITS, *REASONING, *own, *setup.args], log=log, env=STRICT) as server,
        Load(server.url) as load,
    ):
        print(f"healthy after {server.boot_s:.1f} s")
        yield Running(server=server, corpus=corpus, load=load)


def test_same_tokens_while_replicas_join_and_retire(running: Running) -> None:
    server = running.server
    sent = running.wave(1, size=1)
    assert server.must_scale(4)["joining"] == [2, 3]
    sent += running.wave(2, size=1)
    operation = server.must_scale(2)
    assert operation["retiring"] == [2, 3] and operation["moved_requests"] > 0
    running.check(sent)
    assert {rank for stream, _ in sent for rank in stream.ranks} == {0, 1}, "SGLang's ranks are the two replicas"
    assert any(len(stream.ranks) > 1 for stream, _ in sent), "no stream moved"
    settled(lambda: whole(server), SETTLED_WITHIN_S, "at rest")


@pytest.mark.parametrize("rank", [3, 0])
def test_a_replica_is_lost_with_any_of_its_ranks(running: Running, rank: int) -> None:
    """The first rank's, too; the other rank of the replica ends with the one that is killed."""
    server = running.server
    server.must_scale(4)
    pids, sent = server.worker_pids(), running.wave(3 + rank, size=2)
    os.kill(pids[rank], signal.SIGKILL)
    running.check(sent)
    settled(lambda: whole(server) and server.status()["ep_size"] == 4, SETTLED_WITHIN_S, "both replicas are back")
    lost = next(each for each in server.operations() if each["cause"] == "loss")
    mates = [2, 3] if rank == 3 else [0, 1]
    assert lost["lost"] == mates and lost["resent_requests"] > 0
    assert all((server.worker_pids()[each] != pids[each]) == (each in mates) for each in pids)
    assert imbalance(server.status()) is None
    server.must_scale(2)


def test_parts_of_a_replica_are_refused_with_what_is_legal(running: Running) -> None:
    server = running.server
    for body, sentence in (
        ({"new_ep_size": 3}, "ask for a multiple of 2, the ranks of an attention replica, up to 4"),
        ({"restore_ranks": [3]}, "rank 3 cannot be named without rank 2 of its attention replica"),
    ):
        response = server.post("/scale_elastic_ep", body)
        assert response.status_code == 400 and sentence in response.text, response.text
    assert server.status()["attention_tp"] == SIZE
    response = server.post("/generate", {"input_ids": [5], "routed_dp_rank": 1})
    assert response.status_code == 400 and "the active replicas are 0" in response.text, response.text


def test_a_control_request_is_answered_by_each_replica(running: Running) -> None:
    """SGLang waits for as many answers as there are replicas."""
    for size in (4, 2):
        running.server.must_scale(size)
        started = time.monotonic()
        assert running.server.post("/flush_cache", {}).status_code == 200
        assert time.monotonic() - started < 10


BUDGET = 22 << 20
"""At one replica a rank has less KV than its prompts."""


@pytest.mark.soak
@pytest.mark.parametrize("per_device", [1, 2])
def test_kv_of_a_replicas_ranks_changes_together(
    shared: Shared, corpora: Corpora, tmp_path_factory: pytest.TempPathFactory, per_device: int
) -> None:
    """16 columns on six ranks are three or two each, so the devices have unequal room, and a replica that of its
    fullest; caches are full, so that prefixes are evicted and rows move on all of its ranks."""
    corpus, rng = corpora["qwen3_moe"], random.Random(5)
    shared.close()
    args = ["--elasticmoe-attention-tp", str(SIZE), "--elasticmoe-standbys", str(SIZE)]
    args += ["--elasticmoe-device-budget", str(per_device * BUDGET), "--elasticmoe-ranks-per-device", str(per_device)]
    log = tmp_path_factory.mktemp("kv") / "server.log"
    with (
        ElasticServer(corpus.model, args, log=log, capacity=6, kv_tokens=None, env=STRICT) as server,
        Load(server.url) as load,
    ):
        seen: set[int] = set()
        for size in (4, 2, 6, 4, 6, 2):
            load.wait([load.start([rng.randrange(3, VOCAB) for _ in range(320)], 1) for _ in range(20)])
            sent = [(load.start(case.prompt, len(case.ids)), case) for case in corpus.cases[:12]]
            for stream, _ in sent:
                stream.wait_for_tokens(4, 60)
            server.must_scale(size)
            load.wait([stream for stream, _ in sent])
            for stream, case in sent:
                stream.check(case.ids)
            status = server.status()
            tokens = [rank["kv_tokens"] for rank in status["ranks"] if rank["state"] == "active"]
            assert tokens[::SIZE] == tokens[1::SIZE], status["ranks"]
            assert imbalance(status) is None
            seen.update(tokens)
        assert len(seen) >= 3, "KV has not changed its size"
        text = log.read_text(errors="replace")
        assert re.search(r"\([1-9]\d* evicted, [1-9]\d* moved", text), "no row had to move"


@pytest.mark.soak
def test_features_through_changes_and_losses(running: Running) -> None:
    """Sampling with seeds, log-probabilities, grammars, ends and several answers go on as if nothing had happened."""
    server, load = running.server, running.load
    overlap = _NO_OVERLAP not in server.args
    server.must_scale(4)
    features = [feature for feature in running.corpus.features if feature.certain_with_overlap or not overlap]
    settle(features, load)
    pending = {feature.name: feature for feature in features if feature.rank is None}
    rng = random.Random(3)
    for round_ in range(MOST_ROUNDS):
        chosen = spread(sorted(pending), rng, SLOTS * 2)
        pairs = [(pending[name], pending[name].start(load)) for name in chosen]
        for _, stream in pairs:
            stream.wait_for_tokens(8, 60)
        if round_ % 2:
            os.kill(server.worker_pids()[3], signal.SIGKILL)
        else:
            server.must_scale(2)
        load.wait([stream for _, stream in pairs])
        for feature, stream in pairs:
            feature.check(stream)
            if len(stream.ranks) > 1:
                pending.pop(feature.name, None)
        settled(lambda: whole(server), SETTLED_WITHIN_S, "at rest")
        server.must_scale(4)
        if not pending:
            break
    assert not pending, "not every feature was moved in mid-stream"
    server.must_scale(2)
