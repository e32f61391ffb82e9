"""The requests: arrivals and lengths, the same for every method under one seed."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elasticmoe_sglang.errors import UserInputError

_WORDS = (
    "def", "return", "import", "class", "self", "for", "in", "range", "if", "not", "None", "True", "raise", "with",
    "open", "path", "value", "name", "print", "list", "while", "yield", "try", "except", "lambda", "index",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request: `due_at` in seconds since the run's start, tokens wanted, and the prompt's text."""

    request_id: int
    due_at: float
    prompt: str
    prompt_words: int
    output_tokens: int


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Whole numbers from `low` to `high`, both included: uniform, or lognormal around their geometric mean."""

    low: int
    high: int
    shape: str = "uniform"

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """From "32", "8-64" or "lognormal:8-64". Raises UserInputError."""
        shape, _, numbers = text.rpartition(":")
        low, _, high = numbers.partition("-")
        try:
            made = cls(low=int(low), high=int(high or low), shape=shape or "uniform")
        except ValueError as error:
            raise UserInputError(f"{text!r} is no length", hint="Write 32, 8-64 or lognormal:8-64") from error
        if made.shape not in ("uniform", "lognormal") or not 1 <= made.low <= made.high:
            raise UserInputError(f"{text!r} is no length", hint="Write 32, 8-64 or lognormal:8-64")
        return made

    def draw(self, rng: random.Random) -> int:
        if self.shape == "uniform":
            return rng.randint(self.low, self.high)
        # Both ends lie two standard deviations from the middle; what falls outside is clamped.
        middle = (math.log(self.low) + math.log(self.high)) / 2
        sigma = (math.log(self.high) - math.log(self.low)) / 4
        return min(self.high, max(self.low, round(math.exp(rng.gauss(middle, sigma)))))


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Evenly spaced arrivals at `rate` a second; or a trace.

    A window of two seconds then holds as much demand as any other, so that a dip in throughput is due to the service
    and not to the workload.

    Attributes:
        trace: JSON lines {"at": seconds, "prompt_words": n, "output_tokens": n}, replayed as they are; the other
            settings do not apply then, and there are no requests after its last line.
    """

    rate: float = 2.0
    prompt: Lengths = Lengths(low=8, high=32)
    output: Lengths = Lengths(low=16, high=32)
    trace: Path | None = None
    seed: int = 0

    def arrivals(self) -> Iterator[Arrival]:
        """In order of `due_at`, without end unless it is a trace. The same every time.

        Raises:
            UserInputError: the trace is malformed.
        """
        lines = self._read_trace(self.trace) if self.trace is not None else self._drawn(random.Random(self.seed))
        for request_id, (due_at, prompt_words, output_tokens) in enumerate(lines):
            text = " ".join(random.Random(f"{self.seed}/{request_id}").choices(_WORDS, k=prompt_words))
            yield Arrival(
                request_id=request_id,
                due_at=due_at,
                prompt=text,
                prompt_words=prompt_words,
                output_tokens=output_tokens,
            )

    def _drawn(self, rng: random.Random) -> Iterator[tuple[float, int, int]]:
        for number in itertools.count(1):
            yield number / self.rate, self.prompt.draw(rng), self.output.draw(rng)

    @staticmethod
    def _read_trace(path: Path) -> Iterator[tuple[float, int, int]]:
        last = 0.0
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                entry = json.loads(line)
                found = float(entry["at"]), int(entry["prompt_words"]), int(entry["output_tokens"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserInputError(f"{path}:{number} is no request of a trace: {error!r}") from error
            if found[0] < last or min(found[1:]) < 1:
                raise UserInputError(f"{path}:{number}: times must grow, lengths must be at least 1")
            last = found[0]
            yield found
