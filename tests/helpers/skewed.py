"""A server whose router prefers some experts, with the answers that it gives before any change."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elasticmoe_sglang.faults import ENV_FAULTS
from elasticmoe_sglang.tiny_model import VOCAB, make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.load import Load, Stream

TOKENS = 48
PROMPTS = 12


@dataclass(frozen=True, kw_only=True)
class Skewed:
    """answers[i] are the tokens of prompts[i]."""

    server: ElasticServer
    run_dir: Path
    prompts: list[list[int]]
    answers: list[list[int]]

    def start(self, load: Load) -> Stream:
        return load.start(self.prompts[len(load.streams) % PROMPTS], TOKENS)

    def check(self, streams: Sequence[Stream]) -> None:
        """Greedy tokens are those of the server before any change."""
        known = {tuple(prompt): answer for prompt, answer in zip(self.prompts, self.answers, strict=True)}
        for stream in streams:
            stream.check(known[tuple(stream.prompt)])

    def rebalance(self, *, observe_s: Sequence[float] = (4.0,), **body: Any) -> dict[str, Any]:
        """observe_s: the next one where too few tokens came in the one before."""
        for seconds in observe_s:
            response = self.server.post("/elastic_ep/rebalance", {"observe_s": seconds, "wait": True, **body})
            if response.status_code != 409 or "too few" not in response.text:
                break
        assert response.status_code == 200, f"{response.status_code}: {response.text}"
        answer: dict[str, Any] = response.json()
        return answer


@contextlib.contextmanager
def serve_skewed(folder: Path, skew: float, *args: str, **more: Any) -> Iterator[Skewed]:
    """more: of `ElasticServer`."""
    model = make_tiny_model(folder / "model", arch="glm4_moe", skew=skew)
    run_dir = folder / "run"
    flags = ["--elasticmoe-run-dir", str(run_dir), "--disable-radix-cache", *args]
    rng = random.Random(5)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.choice((3, 20, 60)))] for _ in range(PROMPTS)]
    with ElasticServer(model, flags, log=folder / "server.log", env={ENV_FAULTS: "1"}, **more) as server:
        with Load(server.url) as load:
            streams = [load.start(prompt, TOKENS) for prompt in prompts]
            load.wait(streams)
        yield Skewed(server=server, run_dir=run_dir, prompts=prompts, answers=[stream.ids for stream in streams])
