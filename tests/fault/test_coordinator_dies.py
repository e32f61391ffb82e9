"""The coordinator dies in each phase of a change, and with it the server, whose process it shares.

What is left is the HMM, run apart: it rolls the open transaction back, and the server that is started next finds memory
that is whole, answers as before and changes its size. Streams end with the process that held their connections: those
are the requests this row of the fault matrix loses, and a client has to send them again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from tests.helpers.faults import arm, armed, change, imbalance
from tests.helpers.load import Load, settled
from tests.helpers.record import record
from tests.helpers.restarts import PROMPT, Site
from tests.helpers.shared import Shared

pytestmark = [pytest.mark.server, pytest.mark.shared("site"), pytest.mark.timeout(900)]

TOKENS = 400
GONE_WITHIN_S = 15.0


@dataclass(frozen=True, kw_only=True)
class Death:
    """When the server is killed: `rank` reaches `point` in a change between these sizes."""

    start: int
    end: int
    phase: str
    point: str
    rank: int

    @property
    def id(self) -> str:
        return f"{self.start}->{self.end}-{self.phase}-coordinator-{self.point}"


DEATHS = (
    Death(start=2, end=4, phase="committing", point="commit.received", rank=1),
    Death(start=2, end=4, phase="preparing", point="boot.attached", rank=2),
    Death(start=2, end=4, phase="finishing", point="barrier.after", rank=1),
    Death(start=4, end=2, phase="preparing", point="pull.started", rank=1),
    Death(start=4, end=2, phase="committing", point="barrier.before", rank=3),
    Death(start=4, end=2, phase="finishing", point="retire.sent", rank=3),
)


@pytest.fixture
def site(shared: Shared) -> Site:
    return shared.site()


@pytest.mark.parametrize(
    "death",
    [pytest.param(death, id=death.id, marks=() if death is DEATHS[0] else pytest.mark.soak) for death in DEATHS],
)
def test_a_new_server_goes_on_from_the_memory(site: Site, death: Death) -> None:
    server = site.running()
    if death.start != 2:
        change(server, death.start)
    with Load(server.url) as load:
        streams = [load.start(PROMPT, TOKENS) for _ in range(4)]
        for stream in streams:
            stream.wait_for_tokens(4, 60)
        arm(site.run_dir, death.point, death.rank, f"kill:{server.pid}")
        server.scale(death.end, wait=False)
        settled(lambda: not armed(site.run_dir), 30, f"{death.id} happens")
        died = time.monotonic()
        settled(site.alone, GONE_WITHIN_S, "every process has ended")
        gone_s = time.monotonic() - died
        load.wait(streams, GONE_WITHIN_S)
    status = site.hmm.status()
    assert not status.txns and status.counters.internal_errors == 0
    for stream in streams:
        assert stream.error is not None, "its server was killed"

    server = site.next()
    start = site.starts[-1]
    assert start.read_bytes == 0, "a server on a living HMM reads no weights"
    assert start.answer == site.starts[0].answer
    expected = server.generate(PROMPT, max(len(stream.ids) for stream in streams))["output_ids"]
    for stream in streams:
        assert stream.ids == expected[: len(stream.ids)] and not stream.problems
    settled(lambda: imbalance(server.status()) is None, 10, "the ledger has what the placement says")
    change(server, 4)
    change(server, 2)
    settled(lambda: imbalance(server.status()) is None, 10, "the ledger agrees after two changes")
    found = {"gone_s": round(gone_s, 2), "boot_s": round(start.boot_s, 1), "streams_broken": len(streams)}
    print(death.id, found)
    record("fault-matrix", death.id, found)
