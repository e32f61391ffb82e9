"""Prompts, and what plain SGLang (one rank, no flag of ours) answers to them: the reference of end-to-end tests."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elasticmoe_sglang.tiny_model import VOCAB, Arch, Quantization, make_tiny_model
from tests.helpers.load import Load, Output, Stream, first_difference
from tests.helpers.server import SglangServer

REASONING = ("--reasoning-parser", "deepseek-v3")
"""For requests whose reasoning is counted."""
TOKENS = 160
LONG = 640
# A float32 sum taken in another order moves a logit by about 1e-5 of these models' 10 or so. A position whose two best
# tokens are closer than this may go either way and says nothing about a change of membership.
_CERTAIN = 1e-3
LOGPROB_TOLERANCE = 1e-3
_CANDIDATES = 32
_LONG_CANDIDATES = 6
_LONG_TOKENS = 16

_FEATURE_TOKENS = 96
_TOP = 4
_ENDS_AFTER = range(36, 84)
_END_TOKEN = 0
_SPREAD = 4.0
"""A temperature at which these models' tokens are not certain."""
_NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 30, "maxItems": 30}
_PAIRS = 'root ::= pair{30}\npair ::= [0-9] [a-f] "-"'
_FEATURES: Mapping[str, dict[str, Any]] = {
    "logprobs": {"return_logprob": True, "top_logprobs_num": 3, "logprob_start_len": 0},
    "token logprobs": {"return_logprob": True, "token_ids_logprob": [5, 17]},
    "regex": {"sampling": {"regex": r"([0-9]{3}-[a-f]{2}:){14}[A-Z]{4}"}},
    "json schema": {"sampling": {"json_schema": json.dumps(_NUMBERS)}},
    "ebnf": {"sampling": {"ebnf": _PAIRS}},
    "several": {"sampling": {"n": 2}},
    "logit bias": {"sampling": {"logit_bias": {"7": 12.0, "11": 12.0, "13": -100.0}}},
    "reasoning": {"require_reasoning": True},
    # Apart, since without the overlap schedule plain SGLang adds and scales in an order that changes with the process.
    "penalties": {"sampling": {"frequency_penalty": 0.7, "presence_penalty": 0.3}},
    "repetition penalty": {"sampling": {"repetition_penalty": 1.1}},
}
_FROM_ANSWERS = ("stop", "stop regex", "stop token", "end", "min new tokens penalty", "pinned")
"""Their fields depend on the model's answers."""
_SEEDED: Mapping[str, dict[str, Any]] = {
    "seed": {"sampling": {"temperature": _SPREAD, "sampling_seed": 1234}},
    "seed and top-p": {
        "sampling": {"temperature": _SPREAD, "sampling_seed": 7, "top_k": 50, "top_p": 0.8, "min_p": 0.02}
    },
}
"""Plain SGLang ignores the seed: what is right is what an elastic server answers undisturbed."""
_SAMPLED: Mapping[str, dict[str, Any]] = {
    name: {
        "return_logprob": True,
        "top_logprobs_num": _TOP,
        "sampling": {"temperature": _SPREAD, "top_k": _TOP, "n": answers},
    }
    for name, answers in (("sampled", 1), ("several sampled", 2))
}
FEATURE_NAMES = (*_FEATURES, *_FROM_ANSWERS, *_SEEDED, *_SAMPLED)
"""All requests beyond plain greedy ones; `elasticmoe_patches/features.py` says what becomes of them."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A prompt, and the ids (and their text) that must follow."""

    prompt: list[int]
    ids: list[int]
    text: str


@dataclass(frozen=True, kw_only=True)
class Feature:
    """A request beyond a plain greedy one, and what it must give.

    Attributes:
        outputs: by number of the answer. Empty for requests with a seed until `settle`, and for sampled ones.
        rank: the rank that it must be sent to.
    """

    name: str
    prompt: list[int]
    fields: dict[str, Any]
    outputs: dict[int, Output]
    rank: int | None = None

    @property
    def certain_with_overlap(self) -> bool:
        """Whether the answer is the same with the overlap schedule; of penalties it is not, on one rank either.

        SGLang prepares a step before the last one's token is known, unless a prefill came between: which tokens its
        penalties count depends on what else arrives.
        """
        return "penalt" not in self.name

    def start(self, load: Load, *, pinned: bool = True) -> Stream:
        pin = {"routed_dp_rank": self.rank} if self.rank is not None and pinned else {}
        return load.start(self.prompt, _FEATURE_TOKENS, **copy.deepcopy(self.fields), **pin)

    def check(self, stream: Stream) -> None:
        """Ids, text and reason of the end are equal; log-probabilities to float32's rounding.

        Of sampled requests: as many answers as were asked for, all different, of tokens that top-k allows.
        """
        stream.check()
        if self.name in _SAMPLED:
            self._check_sample(stream)
            return
        assert stream.outputs.keys() == self.outputs.keys(), f"{self.name}: {stream}"
        for index, wanted in self.outputs.items():
            got = stream.outputs[index]
            assert got.ids == wanted.ids, f"{self.name}: {stream}: {first_difference(got.ids, wanted.ids)}"
            assert got.text == wanted.text, f"{self.name}: {stream}"
            assert got.finish == wanted.finish, f"{self.name}: {stream}"
            assert got.reasoning_tokens == wanted.reasoning_tokens, f"{self.name}: {stream}"
            assert _token_ids(got.logprobs) == _token_ids(wanted.logprobs), f"{self.name}: {stream}"
            worst = largest_difference(_values(got), _values(wanted))
            assert worst < LOGPROB_TOLERANCE, f"{self.name}: {stream}: a log-probability differs by {worst}"

    def _check_sample(self, stream: Stream) -> None:
        assert len(stream.outputs) == self.fields["sampling"]["n"], f"{self.name}: {stream}"
        for output in stream.outputs.values():
            assert len(output.ids) == _FEATURE_TOKENS, f"{self.name}: {stream}"
            # The tokens before another rank took over have been sent, with the best ones of their positions.
            for token, best in zip(output.ids, output.top_logprobs, strict=True):
                assert token in _token_ids(best), f"{self.name}: {stream}: {token} is none of {best}"
            ranks = [_token_ids(best).index(token) for token, best in zip(output.ids, output.top_logprobs, strict=True)]
            assert len(set(ranks)) == _TOP, f"{self.name}: {stream} was not sampled"
        assert len({tuple(output.ids) for output in stream.outputs.values()}) == len(stream.outputs), str(stream)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Attributes:
    model: the model's folder.
    cases: prompts of 1 to 120 tokens with 160 ids each.
    long: prompts of 640 tokens, several chunks of a prefill, with 16 ids each.
    features: requests with more than a prompt, one of each name.
    """

    model: Path
    cases: list[Case]
    long: list[Case]
    features: list[Feature]


@contextmanager
def plain_server(folder: Path, arch: Arch, quantization: Quantization | None = None) -> Iterator[SglangServer]:
    """Plain SGLang with the float32 tiny model, both in `folder`. Chunks of a prefill are mixed with decoding."""
    model = make_tiny_model(folder / "model", arch=arch, quantization=quantization)
    args = ["--model-path", str(model), "--device", "cpu", "--skip-server-warmup", "--max-total-tokens", "32768"]
    args += ["--disable-overlap-schedule", "--chunked-prefill-size", "32", "--enable-mixed-chunk", *REASONING]
    with SglangServer(args, log=folder / "plain.log", start_timeout_s=400) as server:
        yield server


def make_corpus(server: SglangServer) -> Corpus:
    """Ask a plain server."""
    rng = random.Random(7)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(length)]

    short = [prompt(rng.choice((1, 2, 5, 17, 31, 64, 120))) for _ in range(_CANDIDATES)]
    long = [prompt(LONG) for _ in range(_LONG_CANDIDATES)]
    feature_prompts = itertools.cycle([prompt(length) for length in (9, 40)])
    with Load(server.url) as load:
        cases = ask(load, short, TOKENS)
        long_cases = ask(load, long, _LONG_TOKENS)
        features = _ask_features(load, {name: next(feature_prompts) for name in FEATURE_NAMES})
    assert len(cases) >= 16 and len(long_cases) >= 3, "too few prompts whose answer is certain"
    return Corpus(model=Path(server.args[1]), cases=cases, long=long_cases, features=features)


def ask(load: Load, prompts: Sequence[list[int]], tokens: int) -> list[Case]:
    """Without those where a token was chosen by less than rounding may change."""
    streams = [load.start(prompt, tokens, return_logprob=True, top_logprobs_num=2) for prompt in prompts]
    load.wait(streams)
    cases = []
    for prompt, stream in zip(prompts, streams, strict=True):
        stream.check()
        margins = [best[0] - second[0] for best, second in stream.output.top_logprobs]
        if min(margins) >= _CERTAIN:
            cases.append(Case(prompt=prompt, ids=stream.ids, text=stream.output.text))
    return cases


def spread(names: Sequence[str], rng: random.Random, count: int) -> list[str]:
    """So many of the names, each as often as the others: as many as run together, so that all are in mid-stream."""
    return list(itertools.islice(itertools.cycle(rng.sample(names, len(names))), count))


def settle(features: Sequence[Feature], load: Load) -> None:
    """Let a server that nobody disturbs give the answers to requests with a seed, which plain SGLang does not heed."""
    waiting = [
        (feature, feature.start(load)) for feature in features if feature.name in _SEEDED and not feature.outputs
    ]
    for feature, stream in waiting:
        stream.wait(60).check()
        feature.outputs.update(stream.outputs)


def _ask_features(load: Load, prompts: Mapping[str, list[int]]) -> list[Feature]:
    """By name; all at once, since one at a time takes half a minute."""
    features = []
    for name, prompt in prompts.items():
        fields = {**_FEATURES, **_SEEDED, **_SAMPLED}.get(name)
        prompt, fields = _from_answers(load, name, prompt) if fields is None else (prompt, fields)
        rank = 1 if name == "pinned" else None
        features.append(Feature(name=name, prompt=prompt, fields=dict(fields), outputs={}, rank=rank))
    asked = [feature for feature in features if feature.name not in (*_SEEDED, *_SAMPLED)]
    for feature, stream in [(feature, feature.start(load, pinned=False)) for feature in asked]:
        stream.wait(60).check()
        assert (stream.output.reasoning_tokens > 0) == (feature.name == "reasoning"), f"{feature.name}: {stream}"
        feature.outputs.update(stream.outputs)
    return features


def _from_answers(load: Load, name: str, prompt: list[int]) -> tuple[list[int], dict[str, Any]]:
    """The prompt, or another one that serves, and the fields."""
    if name == "pinned":
        return prompt, {}
    if name in ("end", "min new tokens penalty"):
        prompt, bias, ended_after = _ends_by_itself(load, prompt)
        more = {"min_new_tokens": ended_after + 8} if name != "end" else {}
        return prompt, {"sampling": {"logit_bias": bias, "ignore_eos": False, **more}}
    free = load.start(prompt, _FEATURE_TOKENS).wait(60)
    if name == "stop":
        return prompt, {"sampling": {"stop": [_late_piece(free.output.text)]}}
    if name == "stop regex":
        return prompt, {"sampling": {"stop_regex": re.escape(_late_piece(free.output.text))}}
    late = [token for at, token in enumerate(free.ids) if at > len(free.ids) * 2 // 3 and free.ids.index(token) == at]
    return prompt, {"sampling": {"stop_token_ids": late[:1], "ignore_eos": False}}


def _ends_by_itself(load: Load, prompt: list[int]) -> tuple[list[int], dict[str, float], int]:
    """A prompt and a bias with which the model ends by itself, late, and after how many tokens."""
    turned = [[*prompt[at:], *prompt[:at]] for at in range(min(len(prompt), 10))]
    tried = [(each, {str(_END_TOKEN): 20 + step / 2}) for each in turned for step in range(6)]
    streams = [
        load.start(each, _FEATURE_TOKENS, sampling={"logit_bias": bias, "ignore_eos": False}) for each, bias in tried
    ]
    load.wait(streams)
    for (each, bias), stream in zip(tried, streams, strict=True):
        if len(stream.ids) in _ENDS_AFTER:
            return each, bias, len(stream.ids)
    raise AssertionError(f"no bias ends an answer late: {[len(stream.ids) for stream in streams]}")


def _late_piece(text: str) -> str:
    """Three characters that occur for the first time late in the text."""
    for at in range(len(text) * 3 // 4, len(text) - 3):
        piece = text[at : at + 3]
        if "\ufffd" not in piece and text.find(piece) == at:
            return piece
    raise AssertionError(f"no piece of {text!r} serves as a stop string")


def _values(output: Output) -> list[float]:
    """All log-probabilities of an output, the prompt's first."""
    tops = [entry[0] for position in (*output.top_logprobs, *output.token_logprobs) for entry in position]
    # The prompt's first token has none.
    return [entry[0] for entry in (*output.input_logprobs[1:], *output.logprobs)] + tops


def _token_ids(logprobs: Sequence[Any]) -> list[int]:
    return [entry[1] for entry in logprobs]


def largest_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Raises ValueError when there are more of one than of the other."""
    return max((abs(a - b) for a, b in zip(one, other, strict=True)), default=0.0)
