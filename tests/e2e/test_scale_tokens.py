"""float32: every request's greedy tokens equal plain SGLang's before, during and after changes under load.

The changes are 2 -> 3 -> 1 -> 4 -> 2. Plain SGLang is one rank without any flag of ours. At every change there are
requests that decode, that are in the middle of a chunked prefill, and that wait in a queue; more arrive meanwhile.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from elasticmoe_sglang.tiny_model import Arch, Quantization
from tests.e2e.conftest import Corpora
from tests.helpers.corpus import LONG, REASONING, TOKENS, Case, Corpus, settle, spread
from tests.helpers.elastic import RANKS, ElasticServer, commit_time
from tests.helpers.load import Load, Stream
from tests.helpers.shared import LIMITS, SLOTS, Shared

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

SIZES = (3, 1, 4, 2)
MOST_ROUNDS = 12
DURING = 10
"""Requests sent at most while a change goes on."""
_PAGED = ["--page-size", "16", "--incremental-streaming-output"]
_NO_OVERLAP = "--disable-overlap-schedule"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One server's model and flags."""

    arch: Arch
    args: tuple[str, ...] = ()
    quantization: Quantization | None = None


SETUPS = (
    pytest.param(None, id="shared", marks=pytest.mark.shared("steady", "first")),
    pytest.param(Setup(arch="qwen3_moe"), id="qwen3_moe-overlap", marks=pytest.mark.soak),
    pytest.param(
        Setup(arch="deepseek_v2", args=(*_PAGED, _NO_OVERLAP)),
        id="deepseek_v2-paged-no-overlap",
        marks=pytest.mark.soak,
    ),
    pytest.param(
        Setup(arch="qwen3_moe", args=(*_PAGED, _NO_OVERLAP)), id="qwen3_moe-paged-no-overlap", marks=pytest.mark.soak
    ),
    pytest.param(Setup(arch="deepseek_v2"), id="deepseek_v2-overlap", marks=pytest.mark.soak),
    pytest.param(Setup(arch="deepseek_v3"), id="deepseek_v3-overlap", marks=pytest.mark.soak),
    pytest.param(Setup(arch="qwen2_moe"), id="qwen2_moe-overlap", marks=pytest.mark.soak),
    pytest.param(Setup(arch="glm4_moe"), id="glm4_moe-overlap", marks=pytest.mark.soak),
    pytest.param(Setup(arch="gpt_oss"), id="gpt_oss-overlap", marks=pytest.mark.soak),
    pytest.param(
        Setup(arch="qwen3_moe", args=("--enable-mixed-chunk",)), id="qwen3_moe-mixed-chunk", marks=pytest.mark.soak
    ),
    pytest.param(Setup(arch="qwen3_moe", quantization="fp8"), id="qwen3_moe-fp8", marks=pytest.mark.soak),
    pytest.param(Setup(arch="deepseek_v3", quantization="fp8"), id="deepseek_v3-fp8", marks=pytest.mark.soak),
)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server with the answers that are right for its model."""

    server: ElasticServer
    corpus: Corpus
    load: Load


@pytest.fixture(scope="module", params=SETUPS)
def running(
    request: pytest.FixtureRequest, shared: Shared, corpora: Corpora, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    setup: Setup | None = request.param
    corpus = corpora.of(setup.arch, setup.quantization) if setup else corpora["qwen3_moe"]
    if setup is None:
        server = shared.steady()
        with Load(server.url, headers=server.headers) as load:
            yield Running(server=server, corpus=corpus, load=load)
        return
    shared.close()
    log = tmp_path_factory.mktemp("server") / "server.log"
    args = [*LIMITS, *REASONING, *setup.args]
    with (
        ElasticServer(corpus.model, args, log=log) as server,
        Load(server.url, incremental="--incremental-streaming-output" in args) as load,
    ):
        print(f"healthy after {server.boot_s:.1f} s")
        yield Running(server=server, corpus=corpus, load=load)


class Wave:
    """The requests around one change, with what each must answer."""

    def __init__(self, running: Running, seed: int) -> None:
        self.running = running
        self.rng = random.Random(seed)
        self.sent: list[tuple[Stream, Case]] = []

    def short(self, least: int, most: int) -> Stream:
        """A request of `least` to `most` tokens, with a short prompt."""
        case = self.rng.choice(self.running.corpus.cases)
        return self._send(case, self.rng.randint(least, most))

    def long(self) -> Stream:
        """A request with a long prompt that no rank has in its cache."""
        case = self.rng.choice(self.running.corpus.long)
        return self._send(case, len(case.ids), extra_key=uuid.uuid4().hex)

    def _send(self, case: Case, tokens: int, **fields: Any) -> Stream:
        stream = self.running.load.start(case.prompt, tokens, **fields)
        self.sent.append((stream, case))
        return stream

    def check(self) -> None:
        """All have ended, with the right tokens and text."""
        self.running.load.wait([stream for stream, _ in self.sent])
        for stream, case in self.sent:
            stream.check(case.ids)
            if stream.wanted == len(case.ids):
                assert stream.output.text == case.text, str(stream)


def test_same_tokens_at_a_fixed_size(running: Running) -> None:
    wave = Wave(running, seed=0)
    for case in [*running.corpus.cases, *running.corpus.long]:
        wave._send(case, len(case.ids))
    wave.check()


def test_same_tokens_through_every_change(running: Running) -> None:
    epoch = running.server.status()["epoch"]
    for number, size in enumerate(SIZES, start=1):
        before = len(running.server.status()["membership"])
        wave = Wave(running, seed=number)
        decoding = [wave.short(TOKENS * 3 // 4, TOKENS) for _ in range(before * (SLOTS - 1))]
        for stream in decoding:
            stream.wait_for_tokens(4, 60)
        for _ in range(before):
            wave.long()
            wave.short(10, 30)
            wave.short(10, 30)
        time.sleep(0.05)
        operation = running.server.scale(size, wait=False)
        operation = send_during(wave, operation["operation_id"])
        after = [wave.short(20, 40) for _ in range(2 * size)]
        wave.check()
        assert operation["phase"] == "done", operation["error"]
        report(before, size, operation, [stream for stream, _ in wave.sent])
        check_mixture(operation, [stream for stream, _ in wave.sent])
        assert all(stream.first_at > commit_time(operation) for stream in after)
        status = running.server.status()
        assert status["membership"] == operation["ranks_after"] and status["epoch"] == epoch + number
        ranks = {rank for stream in after for rank in stream.ranks}
        assert ranks == set(status["membership"]), "new requests go to all active ranks and to no other"


def send_during(wave: Wave, operation_id: str) -> dict[str, Any]:
    """Sends on while the change goes on; the operation when it has ended."""
    server = wave.running.server
    sent = 0
    while (operation := server.operation(operation_id))["phase"] not in ("done", "failed", "rolled_back"):
        if sent < DURING:
            wave.long()
            wave.short(5, 30)
            sent += 2
        time.sleep(0.1)
    return operation


def check_mixture(operation: dict[str, Any], streams: Sequence[Stream]) -> None:
    """At the moment of the commit requests were in each state, and a retiring rank's went on elsewhere."""
    commit = commit_time(operation)
    alive = [stream for stream in streams if stream.sent_at < commit < stream.ended_at]
    assert any(stream.first_at < commit for stream in alive), "nobody was decoding"
    assert any(stream.first_at > commit and len(stream.prompt) == LONG for stream in alive), "no prefill was going on"
    assert any(stream.first_at > commit and len(stream.prompt) < LONG for stream in alive), "nobody was waiting"
    if operation["retiring"]:
        moved = [stream for stream in alive if len(stream.ranks) > 1]
        assert operation["moved_requests"] >= len(moved) > 0
        assert all(stream.ranks[-1] in operation["ranks_after"] for stream in moved)


def report(before: int, size: int, operation: dict[str, Any], streams: Sequence[Stream]) -> None:
    total = operation["timings"]["total_ms"]
    print(
        f"{before} -> {size}: {total:.0f} ms, pauses {operation['pause_ms']} ms, {len(streams)} requests, "
        f"{operation['moved_requests']} moved, {sum(len(stream.ranks) > 1 for stream in streams)} in mid-stream"
    )


def test_features_through_changes(running: Running) -> None:
    """Sampling, log-probabilities, grammars, ends, several answers and penalties go on as if there was no move."""
    overlap = _NO_OVERLAP not in running.server.args
    server, load = running.server, running.load
    server.must_scale(3)
    features = [feature for feature in running.corpus.features if feature.certain_with_overlap or not overlap]
    settle(features, load)
    pending = {feature.name: feature for feature in features}
    rng = random.Random(3)
    for _ in range(MOST_ROUNDS):
        chosen = spread(sorted(pending), rng, SLOTS * 2)
        pairs = [(pending[name], pending[name].start(load)) for name in chosen]
        for _, stream in pairs:
            stream.wait_for_tokens(8, 60)
        server.must_scale(1)
        load.wait([stream for _, stream in pairs])
        for feature, stream in pairs:
            feature.check(stream)
            if len(stream.ranks) > 1:
                pending.pop(feature.name, None)
        server.must_scale(3)
        if not pending:
            break
    assert not pending, "not every feature was moved in mid-stream"
    server.must_scale(2)


def test_a_pin_to_a_rank_that_is_not_active_is_refused(running: Running) -> None:
    """With a sentence, and the server goes on: SGLang's own answer is to end."""
    server = running.server
    inactive = next(rank for rank in range(RANKS) if rank not in server.status()["membership"])
    for fields in ({"routed_dp_rank": inactive}, {"input_embeds": [[0.0] * 256]}, {"session_params": {"id": "a"}}):
        prompt = {} if "input_embeds" in fields else {"input_ids": [5, 6]}
        body = {**prompt, "sampling_params": {"max_new_tokens": 2}, **fields}
        response = server.post("/generate", body)
        assert response.status_code == 400 and next(iter(fields)) in response.text, response.text
    assert len(server.generate([5, 6], 2)["output_ids"]) == 2
