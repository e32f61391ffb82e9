"""bfloat16: moving a running request adds nothing to the rounding of the same server without changes.

Greedy tokens may differ where two are close, so texts are not compared: what the elastic server generated is given to
plain SGLang (one rank, no flag of ours) as a prompt, which says how likely each of these tokens is. Decoding and
prefilling round differently, and ranks add up experts in another order than one rank does. How much that explains, the
same elastic server shows while it stays at each of the sizes; what requests show that were moved, in the tokens after
their move, must come from the same distribution.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from elasticmoe_sglang.tiny_model import VOCAB, Arch, make_tiny_model
from tests.helpers import npusim
from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.load import Load, Pump, Stream, settled
from tests.helpers.record import record
from tests.helpers.server import SglangServer
from tests.helpers.shared import LIMITS

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200), pytest.mark.soak]

TOKENS = 80
STREAMS = 12
MOVED = 50
MOST_CHANGES = 40
PERMUTATIONS = 2000
CHANCE = 0.01
"""The test fails by chance once in so many runs, for each of the two statistics."""


def elastic_server(model: Path, device: str, log: Path) -> ElasticServer:
    if device == "cpu":
        return ElasticServer(model, log=log)
    return ElasticServer(
        model,
        [*LIMITS, "--dtype", "bfloat16", "--elasticmoe-standbys", str(RANKS - 1)],
        log=log,
        device=device,
        kv_tokens=16384,
        python=npusim.python_or_skip(),
        env=npusim.environment(devices=RANKS),
    )


CASES = [*((arch, "cpu") for arch in get_args(Arch)), ("qwen3_moe", "npu"), ("deepseek_v2", "npu")]


@pytest.mark.parametrize(("arch", "device"), CASES)
def test_moved_requests_round_as_those_that_stay(arch: Arch, device: str, tmp_path: Path) -> None:
    """On simulated NPUs arithmetic is the CPU's, operator by operator; the pools, the copies and the way are not."""
    model = make_tiny_model(tmp_path / "model", arch=arch, dtype="bfloat16")
    rng = random.Random(21)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(rng.choice((2, 17, 64)))] for _ in range(16)]
    with elastic_server(model, device, tmp_path / "server.log") as server:
        at_rest = []
        for size in range(1, RANKS + 1):
            if server.status()["ep_size"] != size:
                server.must_scale(size)
            with Load(server.url) as load:
                at_rest += [load.start(prompt, TOKENS, return_logprob=True) for prompt in prompts]
                load.wait()
        moved = move_streams(server, prompts, rng)
    args = ["--model-path", str(model), "--device", "cpu", "--skip-server-warmup", "--max-total-tokens", "16384"]
    with SglangServer(args, log=tmp_path / "plain.log") as server:
        after = [differences(server, stream)[stream.moves[0] :] for stream in moved]
        # A token's rounding may depend on its place: streams that stay are looked at from such places on, too.
        places = [stream.moves[0] for stream in moved]
        still = [differences(server, stream)[places[n % len(places)] :] for n, stream in enumerate(at_rest)]
    found = compare([each for each in after if each], [each for each in still if each])
    print(found)
    record("bfloat16-logprobs", arch if device == "cpu" else f"{arch} on simulated NPUs", found)
    assert found["moved"]["streams"] >= MOVED
    assert found["chance_of_distance"] >= CHANCE and found["chance_of_mean"] >= CHANCE


def move_streams(server: ElasticServer, prompts: Sequence[list[int]], rng: random.Random) -> list[Stream]:
    """At least `MOVED` requests that went on at another rank before their last quarter."""

    def request(load: Load) -> Stream:
        return load.start(rng.choice(prompts), TOKENS, return_logprob=True)

    def found(load: Load) -> list[Stream]:
        return [stream for stream in load.streams if stream.moves and stream.moves[0] < TOKENS * 3 // 4]

    with Load(server.url) as load:
        with Pump(load, request, STREAMS) as pump:
            for number in range(MOST_CHANGES):
                settled(lambda: any(4 < len(stream.ids) < TOKENS // 2 for stream in pump.streams), 60, "streams run")
                server.must_scale((1, 4)[number % 2])
                if len(found(load)) > MOVED:
                    break
        load.wait()
        return found(load)


def compare(moved: Sequence[Sequence[float]], still: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Both distributions, and how likely a difference like theirs is by chance: streams, not tokens, are shuffled, for
    the tokens of a stream depend on each other.

    chance_of_distance: of the largest distance between the two cumulative distributions of all tokens (Kolmogorov and
        Smirnov's statistic). chance_of_mean: of the mean of the moved ones being as much larger, of streams' means.
    """
    streams = [*moved, *still]
    values = np.concatenate([np.asarray(stream) for stream in streams])
    owner = np.repeat(np.arange(len(streams)), [len(stream) for stream in streams])
    owner = owner[np.argsort(values, kind="stable")]
    means = np.asarray([statistics.mean(stream) for stream in streams])

    def measure(chosen: np.ndarray[Any, Any]) -> tuple[float, float]:
        inside = chosen[owner]
        distance = np.abs(np.cumsum(inside) / inside.sum() - np.cumsum(~inside) / (~inside).sum()).max()
        return float(distance), float(means[chosen].mean() - means[~chosen].mean())

    labels = np.arange(len(streams)) < len(moved)
    distance, more = measure(labels)
    shuffle = np.random.default_rng(0)
    drawn = [measure(shuffle.permutation(labels)) for _ in range(PERMUTATIONS)]
    return {
        "moved": spread(moved),
        "at_rest": spread(still),
        "distance": round(distance, 4),
        "chance_of_distance": sum(each >= distance for each, _ in drawn) / PERMUTATIONS,
        "mean_larger_by": round(more, 5),
        "chance_of_mean": sum(each >= more for _, each in drawn) / PERMUTATIONS,
    }


def spread(streams: Sequence[Sequence[float]]) -> dict[str, float]:
    ordered = sorted(value for stream in streams for value in stream)
    return {
        "streams": len(streams),
        "tokens": len(ordered),
        "mean": round(statistics.mean(ordered), 5),
        **{f"p{share}": round(ordered[len(ordered) * share // 100], 5) for share in (50, 90, 99)},
        "largest": round(ordered[-1], 4),
    }


def differences(server: SglangServer, stream: Stream) -> list[float]:
    """Of each generated token's log-probability: as it was generated, against the server's for the whole text."""
    stream.check()
    text = [*stream.prompt, *stream.ids]
    answer = server.generate(text, 1, return_logprob=True, logprob_start_len=0)
    scored = answer["meta_info"]["input_token_logprobs"][len(stream.prompt) :]
    # SGLang scores the last id of the vocabulary as if it was id 0: it takes it for a padded image.
    wanted = [0 if token == VOCAB - 1 else token for token in stream.ids]
    assert [entry[1] for entry in scored] == wanted
    assert [entry[1] for entry in stream.output.logprobs] == stream.ids
    pairs = zip(stream.ids, scored, stream.output.logprobs, strict=True)
    return [0.0 if token == VOCAB - 1 else abs(a[0] - b[0]) for token, a, b in pairs]
