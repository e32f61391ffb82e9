"""Every capacity from 2 to 16 serves and changes its size under load, with plain SGLang's tokens (float32).

16 experts, 8 heads and the tokens of a prefill step are divided by few of these numbers. Each server starts on three
ranks of an uneven placement where it can, goes to one rank and to all that may exist, and back.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from elasticmoe_sglang.tiny_model import Arch
from tests.e2e.conftest import Corpora
from tests.helpers.corpus import Case
from tests.helpers.elastic import ElasticServer, commit_time
from tests.helpers.load import Load, Pump, Stream, settled

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

EXPERTS = 16
STREAMS = 6
SHORT = 16
IN_CI: tuple[tuple[Arch, int], ...] = (("deepseek_v2", 3), ("qwen3_moe", 6), ("qwen3_moe", 8))
ARCHS: tuple[Arch, ...] = ("qwen3_moe", "deepseek_v2")
_PAGED = ["--page-size", "16"]
"""With pages a rank's share of a prefill step must be whole ones, for every other capacity here."""


def every_case() -> list[pytest.param]:
    cases = [(arch, capacity) for arch in ARCHS for capacity in range(2, EXPERTS + 1)]
    return [pytest.param(*case, marks=() if case in IN_CI else pytest.mark.soak) for case in cases]


def course(capacity: int) -> list[int]:
    """The sizes of one server, the first at its start: up, down to one, up to all, and back."""
    start = min(3, capacity)
    wanted = [start, min(4, capacity), 1, capacity, start]
    return [size for at, size in enumerate(wanted) if at == 0 or size != wanted[at - 1]]


@pytest.mark.parametrize(("arch", "capacity"), every_case())
def test_a_capacity_changes_its_size_with_equal_tokens(
    arch: Arch, capacity: int, corpora: Corpora, tmp_path: Path
) -> None:
    corpus = corpora[arch]
    rng = random.Random(capacity)
    expected: dict[str, Case] = {}

    def request(load: Load) -> Stream:
        case = rng.choice(corpus.cases)
        stream = load.start(case.prompt, rng.randint(len(case.ids) // 2, len(case.ids)))
        expected[stream.rid] = case
        return stream

    start, *sizes = course(capacity)
    args = _PAGED if capacity % 2 else []
    options = {"log": tmp_path / "server.log", "ep_size": start, "capacity": capacity}
    with ElasticServer(corpus.model, args, **options) as server, Load(server.url) as load:
        check_placement(server, start)
        check_all_ranks(load, corpus.cases, start)
        with Pump(load, request, STREAMS) as pump:
            for size in sizes:
                settled(lambda: any(len(stream.ids) > 4 for stream in alive(pump)), 60, "a stream decodes")
                operation = server.must_scale(size)
                commit = commit_time(operation)
                settled(lambda at=commit: went_on(pump, at), 60, "a stream goes on after the commit")
                total = operation["timings"]["total_ms"]
                print(f"{arch} {size} of {capacity}: {total:.0f} ms, pause {operation['pause_ms']}")
                check_placement(server, size)
                check_all_ranks(load, corpus.cases, size)
        load.wait()
    for stream in pump.streams:
        stream.check(expected[stream.rid].ids)


def alive(pump: Pump) -> list[Stream]:
    return [stream for stream in pump.streams if not stream.done.done()]


def went_on(pump: Pump, commit: float) -> bool:
    """A stream received tokens on both sides of the commit."""
    return any(stream.first_at < commit < stream.arrivals[-1][0] for stream in pump.streams if stream.arrivals)


def check_all_ranks(load: Load, cases: list[Case], size: int) -> None:
    """New requests go to all active ranks, each of which answers with the right tokens."""
    sent = [(load.start(case.prompt, SHORT), case) for case in itertools.islice(itertools.cycle(cases), 2 * size)]
    load.wait([stream for stream, _ in sent])
    for stream, case in sent:
        stream.check(case.ids)
    assert len({stream.ranks[0] for stream, _ in sent}) == size


def check_placement(server: ElasticServer, size: int) -> None:
    """Every column is held by an active rank, and no rank holds more than one more than another."""
    status = server.status()
    held = Counter(status["placement"])
    assert len(status["membership"]) == size and set(held) == set(status["membership"])
    assert sum(held.values()) == EXPERTS and max(held.values()) - min(held.values()) <= 1, held
