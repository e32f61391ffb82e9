"""Greedy tokens equal transformers', through changes and a killed rank: of models that plain SGLang, too, computes with
this project's own code on the CPU platform, so that a fault of both is seen.

Block-quantised fp8: the CPU platform dequantises weights to float32 and leaves activations as they are, so with float32
activations the reference computes the same model. gpt-oss: the experts' biases and clamped SwiGLU, sinks and sliding
windows. Tokens that rounding may change are left out, as in the other tests.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from elasticmoe_sglang.tiny_model import VOCAB, Arch, Quantization, make_tiny_model
from tests.helpers.corpus import Case, ask
from tests.helpers.elastic import ElasticServer
from tests.helpers.faults import SETTLED_WITHIN_S, imbalance, whole
from tests.helpers.load import Load, Stream, settled
from tests.helpers.reference import dequantised, greedy
from tests.helpers.shared import LIMITS, column_bytes, tensor_bytes

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

TOKENS = 48
REFERENCE_TOKENS = 24
SIZES = (3, 1, 4, 2)
STREAMS = 6
DECODES_AGAIN = "requests that came with their KV decode again"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Attributes:
    wide: (model, folder) -> the folder of what transformers is given.
    """

    arch: Arch
    quantization: Quantization | None = None
    wide: Callable[[Path, Path], Path] = lambda model, folder: model


SETUPS = (
    pytest.param(Setup(arch="qwen3_moe", quantization="fp8", wide=dequantised), id="qwen3_moe-fp8"),
    pytest.param(Setup(arch="gpt_oss"), id="gpt_oss"),
)


@pytest.mark.parametrize("setup", SETUPS)
def test_tokens_through_every_change_and_a_killed_rank(setup: Setup, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", arch=setup.arch, quantization=setup.quantization)
    rng = random.Random(5)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.choice((1, 17, 64, 200)))] for _ in range(10)]
    with ElasticServer(model, LIMITS, log=tmp_path / "server.log") as server, Load(server.url) as load:
        print(f"healthy after {server.boot_s:.1f} s")
        weight = server.status()["memory"]["column_bytes"]
        assert 0 <= weight - column_bytes(model) <= 4096, "weights, scales, biases, alignment, and up to a page"
        read = sum(rank["checkpoint_bytes"] or 0 for rank in server.status()["ranks"])
        assert read == sum(tensor_bytes(model).values()), "every byte of the checkpoint is read by one rank"
        cases = ask(load, prompts, TOKENS)
        assert len(cases) >= STREAMS
        expected = greedy(setup.wide(model, tmp_path / "wide"), [case.prompt for case in cases], REFERENCE_TOKENS)
        assert [case.ids[:REFERENCE_TOKENS] for case in cases] == expected
        for size in SIZES:
            streams = started(load, cases)
            server.must_scale(size)
            check(load, streams, cases)
            assert imbalance(server.status()) is None
        server.must_scale(3)
        streams = started(load, cases)
        os.kill(server.worker_pids()[1], signal.SIGKILL)
        check(load, streams, cases)
        settled(lambda: whole(server), SETTLED_WITHIN_S, "the server is whole")
        check(load, started(load, cases), cases)
    assert DECODES_AGAIN in (tmp_path / "server.log").read_text(), (
        "with pages of one token no moved stream is prefilled"
    )


def started(load: Load, cases: Sequence[Case]) -> list[Stream]:
    """One stream a case, all of which have begun to decode or wait behind those that have."""
    streams = [load.start(case.prompt, TOKENS) for case in cases]
    streams[0].wait_for_tokens(8, 60)
    return streams


def check(load: Load, streams: Sequence[Stream], cases: Sequence[Case]) -> None:
    load.wait(streams)
    for stream, case in zip(streams, cases, strict=True):
        stream.check(case.ids)
