"""Whether moving a running request adds anything to the rounding of the same server without changes.

What the elastic server generated is given to plain SGLang as a prompt, which says how likely each of these tokens is.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from elasticmoe_sglang.tiny_model import VOCAB
from tests.helpers.elastic import ElasticServer
from tests.helpers.load import Load, Pump, Stream, settled
from tests.helpers.server import SglangServer

TOKENS = 80
MOVED = 50
CHANCE = 0.01
"""A test fails by chance once in so many runs, for each of the two statistics."""
_STREAMS = 12
_MOST_CHANGES = 80
_PERMUTATIONS = 2000


def some_prompts(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(3, VOCAB) for _ in range(rng.choice((2, 17, 64)))] for _ in range(16)]


def streams_at_rest(server: ElasticServer, prompts: Sequence[list[int]], ranks: int) -> list[Stream]:
    """Every prompt's answer while the server stays at each of the sizes 1 to `ranks`; it ends at the last."""
    found = []
    for size in range(1, ranks + 1):
        if server.status()["ep_size"] != size:
            server.must_scale(size)
        with Load(server.url) as load:
            found += [load.start(prompt, TOKENS, return_logprob=True) for prompt in prompts]
            load.wait()
    return found


def against(server: SglangServer, moved: Sequence[Stream], at_rest: Sequence[Stream]) -> dict[str, Any]:
    """Both distributions of differences to what this server finds, see `compare`."""
    after = [differences(server, stream)[stream.moves[0] :] for stream in moved]
    # A token's rounding may depend on its place: streams that stay are looked at from such places on, too.
    places = [stream.moves[0] for stream in moved]
    still = [differences(server, stream)[places[n % len(places)] :] for n, stream in enumerate(at_rest)]
    return compare([each for each in after if each], [each for each in still if each])


def check(found: dict[str, Any]) -> None:
    """Enough were moved, and what they show comes from the distribution of those that stayed."""
    assert found["moved"]["streams"] >= MOVED
    assert found["chance_of_distance"] >= CHANCE and found["chance_of_mean"] >= CHANCE


def move_streams(
    server: ElasticServer, prompts: Sequence[list[int]], rng: random.Random, sizes: tuple[int, int] = (1, 4)
) -> list[Stream]:
    """At least `MOVED` requests that went on at another rank before their last quarter, changing between `sizes`."""

    def request(load: Load) -> Stream:
        return load.start(rng.choice(prompts), TOKENS, return_logprob=True)

    def found(load: Load) -> list[Stream]:
        return [stream for stream in load.streams if stream.moves and stream.moves[0] < TOKENS * 3 // 4]

    with Load(server.url) as load:
        with Pump(load, request, _STREAMS) as pump:
            for number in range(_MOST_CHANGES):
                settled(lambda: any(4 < len(stream.ids) < TOKENS // 2 for stream in pump.streams), 60, "streams run")
                server.must_scale(sizes[number % 2])
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
    drawn = [measure(shuffle.permutation(labels)) for _ in range(_PERMUTATIONS)]
    return {
        "moved": spread(moved),
        "at_rest": spread(still),
        "distance": round(distance, 4),
        "chance_of_distance": sum(each >= distance for each, _ in drawn) / _PERMUTATIONS,
        "mean_larger_by": round(more, 5),
        "chance_of_mean": sum(each >= more for _, each in drawn) / _PERMUTATIONS,
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
