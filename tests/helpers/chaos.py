"""Random requests, whose clients leave or abort now and then."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.helpers.corpus import Case
from tests.helpers.load import Load, Stream

TOKENS = 120
CUT = 0.2
"""Share of the requests that their clients do not let finish."""


@dataclass
class Chaos:
    """Random requests, whose clients leave or abort now and then."""

    cases: list[Case]
    rng: random.Random
    expected: dict[str, list[int]] = field(default_factory=dict)
    doomed: list[tuple[Stream, int]] = field(default_factory=list)
    cuts: int = 0

    def request(self, load: Load) -> Stream:
        case = self.rng.choice(self.cases)
        wanted = self.rng.randint(1, TOKENS)
        fields = {"extra_key": str(self.rng.randrange(1 << 30))} if self.rng.random() < 0.3 else {}
        stream = load.start(case.prompt, wanted, **fields)
        self.expected[stream.rid] = case.ids
        if self.rng.random() < CUT:
            self.doomed.append((stream, self.rng.randint(0, wanted)))
        self._cut(load)
        return stream

    def _cut(self, load: Load) -> None:
        """Called with every new request, so the moments are as random as the lengths."""
        for stream, after in [pair for pair in self.doomed if len(pair[0].ids) >= pair[1]]:
            self.doomed.remove((stream, after))
            self.cuts += 1
            (load.abort if self.cuts % 2 else load.disconnect)(stream)

    @staticmethod
    def has_cut(load: Load) -> bool:
        """Clients have cut requests short in both ways; how soon depends on the dice and on how fast requests end."""
        return {stream.cut for stream in load.streams} >= {"abort", "disconnect"}

    def check(self, load: Load) -> None:
        """Every stream has ended with the right tokens, none twice or missing."""
        for stream in load.streams:
            stream.check(self.expected.get(stream.rid))
