"""Workers that die together, or while survivors recover from another death: no stream is lost, the server goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.helpers.elastic import RANKS
from tests.helpers.faults import SETTLED_WITHIN_S, arm, change, imbalance, whole
from tests.helpers.load import Pump, settled
from tests.helpers.shared import Faulty, Shared

pytestmark = [pytest.mark.server, pytest.mark.shared("faulty"), pytest.mark.timeout(300)]

STREAMS = 6


@pytest.fixture
def bench(shared: Shared) -> Faulty:
    return shared.faulty()


@dataclass(frozen=True, kw_only=True)
class Deaths:
    """`ranks` are killed in this order, `apart_s` after each other. A rank named twice dies again as soon as another
    worker has its place."""

    ranks: tuple[int, ...]
    apart_s: float = 0.0

    @property
    def id(self) -> str:
        return f"{'-'.join(map(str, self.ranks))}-{self.apart_s * 1e3:.0f}ms"


CASES = (
    Deaths(ranks=(1, 3)),
    Deaths(ranks=(0, 2)),
    Deaths(ranks=(2, 3), apart_s=0.05),
    Deaths(ranks=(3, 0), apart_s=0.1),
    Deaths(ranks=(0, 0)),
    Deaths(ranks=(1, 2, 3)),
    Deaths(ranks=(0, 1, 0, 2), apart_s=0.03),
)
SOAKED = CASES[2:4] + CASES[5:6]


def kill(bench: Faulty, rank: int, killed: set[int]) -> None:
    """SIGKILL to the rank's worker, once it has one that was not killed before."""
    deadline = time.monotonic() + SETTLED_WITHIN_S
    while True:
        pids = {each["rank"]: each["pid"] for each in bench.server.status()["ranks"]}
        pid = pids[rank]
        if pid is not None and pid not in killed:
            break
        assert time.monotonic() < deadline, f"rank {rank} was not replaced: {pids}\n{bench.server.log_tail(150)}"
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    killed.add(pid)


@pytest.mark.parametrize(
    "deaths", [pytest.param(case, id=case.id, marks=pytest.mark.soak if case in SOAKED else ()) for case in CASES]
)
def test_streams_outlive_deaths_that_overlap(bench: Faulty, deaths: Deaths) -> None:
    killed: set[int] = set()
    with streaming(bench, killed):
        for rank in deaths.ranks:
            kill(bench, rank, killed)
            time.sleep(deaths.apart_s)
    assert bench.server.status()["membership"] == list(range(RANKS)), "lost ranks are back"
    change(bench.server, 3)


def test_a_survivor_dies_when_it_has_pulled_columns(bench: Faulty) -> None:
    """The others have pulled theirs: the next attempt pulls them again, and replaces nobody."""
    killed: set[int] = set()
    with streaming(bench, killed):
        killed.add(bench.server.worker_pids()[2])
        arm(bench.run_dir, "pull.done", 2, "self")
        kill(bench, 1, killed)
    losses = [each for each in bench.server.operations() if each["cause"] == "loss"]
    assert (losses[0]["lost"], losses[0]["ranks_after"]) == ([1, 2], [0, 3])


@contextmanager
def streaming(bench: Faulty, killed: set[int]) -> Iterator[None]:
    """Four ranks decode; after the block the server becomes whole without the `killed`, and no stream is lost."""
    server = bench.server
    change(server, RANKS)
    settled(lambda: whole(server), SETTLED_WITHIN_S, "the server is whole before")
    with Pump(bench.load, bench.request, STREAMS) as pump:
        settled(lambda: len(pump.streams) >= STREAMS, 10, "streams start")
        for stream in pump.streams[:STREAMS]:
            stream.wait_for_tokens(4, 60)
        epoch, at = server.status()["epoch"], time.monotonic()
        yield
        try:
            settled(
                lambda: (
                    server.status()["epoch"] > epoch
                    and not killed & set(server.worker_pids().values())
                    and whole(server)
                ),
                SETTLED_WITHIN_S,
                "the server is whole again",
            )
        except TimeoutError as error:
            raise AssertionError(f"{error}: {imbalance(server.status())}\n{server.log_tail(200)}") from error
        print(f"whole after {time.monotonic() - at:.2f} s, ranks {server.status()['membership']}")
        running = [stream for stream in pump.streams if not stream.done.done()]
        for stream, tokens in [(stream, len(stream.ids)) for stream in running]:
            stream.wait_for_tokens(min(tokens + 1, stream.wanted), SETTLED_WITHIN_S)
    bench.load.wait(pump.streams)
    for stream in pump.streams:
        stream.check(bench.expected[stream.rid])
    assert sum(stream.lost for stream in pump.streams) == 0
