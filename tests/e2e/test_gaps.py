"""A change under load is hardly noticed by those who read along: every stream's gaps stay within a limit."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from benchmarks.streams import worst_gap
from elasticmoe_sglang.tiny_model import VOCAB
from tests.helpers.elastic import ElasticServer
from tests.helpers.load import Load, Pump, Stream, settled
from tests.helpers.record import record
from tests.helpers.shared import SLOTS, Shared, standby_pid

pytestmark = [pytest.mark.server, pytest.mark.shared("steady"), pytest.mark.timeout(240)]

SIZES = (3, 2, 1, 2)
STREAMS = SLOTS  # so that a single rank decodes all of them
TOKENS = 120
AROUND_S = 0.3


def test_no_stream_waits_long_for_a_change(shared: Shared) -> None:
    """Up and down by one rank: gaps of at most five times the stream's median, or 150 ms where that is more."""
    server = shared.steady()
    warm(server)
    rng = random.Random(17)

    def request(load: Load) -> Stream:
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.choice((2, 17, 64)))]
        return load.start(prompt, rng.randint(TOKENS // 2, TOKENS))

    changes = []
    with Load(server.url) as load, Pump(load, request, STREAMS) as pump:
        for size in SIZES:
            settled(lambda: standby_pid(server) is not None, 60, "a standby")
            time.sleep(1.0)  # streams at this size, for their medians
            begun = time.time()
            operation = server.must_scale(size)
            changes.append((operation, begun, time.time() + AROUND_S))
            time.sleep(AROUND_S)
    load.wait()
    assert not any(stream.lost for stream in load.streams)
    rows = []
    for operation, since, until in changes:
        found = [worst for stream in pump.streams if (worst := worst_gap(gaps(stream), since, until)) is not None]
        assert len(found) >= STREAMS, "the change was not under load"
        worst = max(found, key=lambda gap: gap.over_limit)
        rows.append(
            {
                "change": f"{operation['old_ep_size']} -> {operation['new_ep_size']}",
                "longest_gap_ms": round(worst.longest * 1e3, 1),
                "median_gap_ms": round(worst.median * 1e3, 1),
                "limit_ms": round(worst.limit * 1e3, 1),
                "pause_ms": operation["pause_ms"],
                "timings": operation["timings"],
            }
        )
    record("gaps", "up and down by one rank", {"streams": STREAMS, "rows": rows})
    late = [row for row in rows if row["longest_gap_ms"] > row["limit_ms"]]
    assert not late, late


def warm(server: ElasticServer) -> None:
    """What happens once in a server's life is no part of a change: every rank that joins here has joined before."""
    for size in (3, 1, 2):
        settled(lambda: standby_pid(server) is not None, 60, "a standby")
        server.must_scale(size)


def gaps(stream: Stream) -> list[tuple[float, float]]:
    times = [at for at, _ in stream.arrivals]
    return [(later, later - earlier) for earlier, later in itertools.pairwise(times)]
