"""Ranks die under requests with every feature: each goes on elsewhere, from the journal, as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Corpora
from tests.helpers.corpus import Corpus, settle, spread
from tests.helpers.elastic import RANKS
from tests.helpers.faults import SETTLED_WITHIN_S, change, imbalance, whole
from tests.helpers.load import settled
from tests.helpers.shared import SLOTS, Faulty, Shared, faulty_server

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

MOST_ROUNDS = 12
AT_ONCE = SLOTS * RANKS


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((), id="shared", marks=pytest.mark.shared("faulty")),
        pytest.param(("--disable-overlap-schedule",), id="no-overlap", marks=pytest.mark.soak),
    ],
)
def bench(
    request: pytest.FixtureRequest, shared: Shared, corpora: Corpora, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Faulty, Corpus, bool]]:
    corpus = corpora["qwen3_moe"]  # first: it may need a server of its own
    if not request.param:
        yield shared.faulty(), corpus, True
        return
    shared.close()
    with faulty_server(tmp_path_factory.mktemp("faulty"), request.param) as faulty:
        yield faulty, corpus, False


def test_features_through_deaths(bench: tuple[Faulty, Corpus, bool]) -> None:
    faulty, corpus, overlap = bench
    server, load = faulty.server, faulty.load
    change(server, RANKS)
    features = [feature for feature in corpus.features if feature.certain_with_overlap or not overlap]
    settle(features, load)
    pending = {feature.name: feature for feature in features}
    rng = random.Random(5)
    for number in range(MOST_ROUNDS):
        settled(lambda: whole(server), SETTLED_WITHIN_S, "the server is whole before")
        chosen = spread(sorted(pending), rng, AT_ONCE)
        pairs = [(pending[name], pending[name].start(load)) for name in chosen]
        for _, stream in pairs:
            stream.wait_for_tokens(8, 60)
        pids = server.worker_pids()
        # Two of four, since one device has no room for all columns; rank 0 among them at every other time.
        killed = [0, 2] if number % 2 else [1, 3]
        for rank in killed:
            os.kill(pids[rank], signal.SIGKILL)
        load.wait([stream for _, stream in pairs])
        for feature, stream in pairs:
            feature.check(stream)
            if set(stream.ranks) & set(killed) and len(stream.ranks) > 1:
                pending.pop(feature.name, None)
        settled(lambda: whole(server), SETTLED_WITHIN_S, "the server is whole again")
        assert imbalance(server.status()) is None
        change(server, RANKS)
        if not pending:
            break
    assert not pending, "not every feature was in mid-stream on a rank that died"
