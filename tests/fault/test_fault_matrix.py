"""A process is killed in each phase of a change, up and down: serving goes on, nothing is lost, the next change works.

One server for all cases. Streams run all the time, and so many requests with long prompts that some are being prefilled
and some wait in queues when the process is killed. The points at which processes are killed are those of
`elasticmoe_sglang/faults.py`. At the end the matrix is printed (`pytest -s`) and recorded (`tests/helpers/record.py`).
"Silence" is the longest time around the fault in which no request received a token, "longest gap" the same of any one
stream: a stream whose rank was lost also waits until the ranks that are left, whose queues are never empty, have room.
"Whole again" is when the HMM's ledger equalled the placement and every rank had a living process, counted from the
fault. A change that is `rolled_back` has left the membership as it was; one that has `failed` serves with the new one.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from tests.helpers.faults import SETTLED_WITHIN_S, arm, armed, change, imbalance, whole
from tests.helpers.load import Pump, longest_gap, longest_silence, settled
from tests.helpers.record import record
from tests.helpers.shared import FAULTY_TOKENS, Faulty, Shared

pytestmark = [pytest.mark.server, pytest.mark.shared("faulty"), pytest.mark.timeout(600)]

Role = Literal["joining rank", "survivor", "retiring rank", "rank 0", "HMM"]
Way = Literal["2 -> 4", "4 -> 2"]
Phase = Literal["preparing", "committing", "finishing"]

STREAMS = 4
LENGTHY = 20
"""Requests with long prompts that run beside them: more than four ranks have slots for."""
TARGET_SILENCE_S = 2.0
"""On a quiet machine; the table says how many cases met it. Tests share theirs with others."""
# Whoever waits for a dead process until a deadline of the hand-over is over waits 5 s.
BACK_WITHIN_S = 4.5


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Who is killed when. `point` is reached by the rank in the part of `at`, which kills itself or the victim."""

    victim: Role
    way: Way
    phase: Phase
    point: str
    at: Role

    @property
    def id(self) -> str:
        return f"{self.way.replace(' ', '')}-{self.phase}-{self.victim.replace(' ', '')}-{self.point}"


def _up(victim: Role, phase: Phase, point: str, at: Role) -> Fault:
    return Fault(victim=victim, way="2 -> 4", phase=phase, point=point, at=at)


def _down(victim: Role, phase: Phase, point: str, at: Role) -> Fault:
    return Fault(victim=victim, way="4 -> 2", phase=phase, point=point, at=at)


FAULTS = (
    _up("joining rank", "preparing", "boot.attached", "joining rank"),
    _up("joining rank", "committing", "commit.received", "survivor"),
    _up("joining rank", "finishing", "barrier.after", "joining rank"),
    _up("survivor", "preparing", "boot.attached", "joining rank"),
    _up("survivor", "committing", "barrier.before", "survivor"),
    _up("survivor", "finishing", "barrier.after", "survivor"),
    _up("rank 0", "preparing", "boot.attached", "joining rank"),
    _up("rank 0", "committing", "barrier.before", "rank 0"),
    _up("rank 0", "finishing", "barrier.after", "rank 0"),
    _up("HMM", "preparing", "boot.attached", "joining rank"),
    _up("HMM", "committing", "commit.received", "survivor"),
    _up("HMM", "finishing", "barrier.after", "survivor"),
    _down("survivor", "preparing", "pull.started", "survivor"),
    _down("survivor", "committing", "barrier.before", "survivor"),
    _down("survivor", "finishing", "resume.before", "survivor"),
    _down("retiring rank", "preparing", "pull.started", "survivor"),
    _down("retiring rank", "committing", "barrier.before", "retiring rank"),
    _down("retiring rank", "finishing", "retire.sending", "retiring rank"),
    _down("retiring rank", "finishing", "retire.sent", "retiring rank"),
    _down("rank 0", "preparing", "pull.started", "rank 0"),
    _down("rank 0", "committing", "barrier.before", "rank 0"),
    _down("rank 0", "finishing", "barrier.after", "rank 0"),
    _down("HMM", "preparing", "pull.started", "survivor"),
    _down("HMM", "committing", "commit.received", "survivor"),
    _down("HMM", "finishing", "barrier.after", "survivor"),
)
ALWAYS = {
    "2->4-preparing-joiningrank-boot.attached",
    "2->4-committing-survivor-barrier.before",
    "2->4-committing-rank0-barrier.before",
    "2->4-preparing-HMM-boot.attached",
    "4->2-finishing-retiringrank-retire.sending",
    # A survivor dies while retiring ranks migrate requests: once nobody resumed them until the deadline.
    "4->2-finishing-rank0-barrier.after",
}
"""The cases of every test run; the others are for `make soak`."""


def _params() -> Iterator[Any]:
    assert {fault.id for fault in FAULTS} >= ALWAYS, "a standing case has another name now"
    for fault in FAULTS:
        yield pytest.param(fault, id=fault.id, marks=() if fault.id in ALWAYS else pytest.mark.soak)


@dataclass
class Row:
    """One case's outcome."""

    fault: Fault
    phase: str
    silence_s: float
    gap_s: float
    median_ms: float
    settled_s: float
    requests: int
    no_token_yet: int
    lost: int

    def facts(self) -> dict[str, Any]:
        return {
            "ended_as": self.phase,
            "silence_s": round(self.silence_s, 2),
            "longest_gap_s": round(self.gap_s, 2),
            "median_gap_ms": round(self.median_ms, 1),
            "whole_again_s": round(self.settled_s, 2),
            "requests": self.requests,
            "prefilled_or_queued_at_the_kill": self.no_token_yet,
            "lost": self.lost,
        }


@pytest.fixture
def bench(shared: Shared) -> Faulty:
    return shared.faulty()


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    found: list[Row] = []
    yield found
    _publish(found)


def _publish(rows: list[Row]) -> None:
    """Print the table and record it; a case with a lost or wrong request is not in it: it has failed."""
    if not rows:
        return
    lines = [
        "| change | phase | killed | at | ended as | silence, s | gap, s | whole again, s | requests | no token yet |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        fault = row.fault
        lines.append(
            f"| {fault.way} | {fault.phase} | {fault.victim} | {fault.point} | {row.phase} | {row.silence_s:.2f} "
            f"| {row.gap_s:.2f} | {row.settled_s:.2f} | {row.requests} | {row.no_token_yet} |"
        )
    met = sum(row.silence_s <= TARGET_SILENCE_S for row in rows)
    lines.append(f"silence of at most {TARGET_SILENCE_S:g} s: {met} of {len(rows)}")
    print("\n" + "\n".join(lines))
    for row in rows:
        record("fault-matrix", row.fault.id, row.facts())


def cast(bench: Faulty, fault: Fault) -> dict[Role, int]:
    """Which rank has which part in the coming change."""
    members = bench.server.status()["membership"]
    empty = [rank for rank in range(4) if rank not in members]
    if fault.way == "2 -> 4":
        return {"rank 0": 0, "survivor": members[1], "joining rank": empty[0]}
    return {"rank 0": 0, "survivor": members[1], "retiring rank": members[-1]}


def victim_pid(bench: Faulty, fault: Fault, parts: dict[Role, int]) -> int | None:
    status = bench.server.status()
    if fault.victim == "HMM":
        return int(status["memory"]["pid"])
    pid = status["ranks"][parts[fault.victim]]["pid"]
    return None if pid is None else int(pid)


def arm_for(bench: Faulty, fault: Fault, parts: dict[Role, int]) -> None:
    action = "self" if fault.victim == fault.at else f"kill:{victim_pid(bench, fault, parts)}"
    arm(bench.run_dir, fault.point, parts[fault.at], action)


def begin(bench: Faulty, fault: Fault) -> tuple[str, float]:
    """Starts the change with the fault armed; its operation and when the fault happened."""
    parts = cast(bench, fault)
    booted = (
        fault.victim == "joining rank" and fault.at != "joining rank"
    )  # its process is not in its rank before the change
    if not booted:
        arm_for(bench, fault, parts)
    if fault.way == "2 -> 4":
        operation = bench.server.scale(4, wait=False)
    else:
        members = bench.server.status()["membership"]
        operation = bench.server.scale(retire=members[2:], wait=False)
    if booted:
        rank = parts["joining rank"]
        settled(lambda: bench.server.status()["ranks"][rank]["state"] == "joining", 20, "the joining rank boots")
        arm_for(bench, fault, parts)
    settled(lambda: not armed(bench.run_dir), 30, f"{fault.id} happens")
    return operation["operation_id"], time.time()


def check_end(fault: Fault, operation: dict[str, Any], status: dict[str, Any]) -> None:
    """The operation's phase says what serves: a fault up to the commit leaves the ranks of before, one after it those
    of the change. A rank that was lost is back in either case."""
    # The HMM has no part in the commit: the ranks commit, and what fails is giving memory back.
    committed = fault.phase == "finishing" or (fault.victim == "HMM" and fault.phase == "committing")
    wanted = operation["ranks_after"] if committed else operation["ranks_before"]
    assert status["target_ranks"] == status["membership"] == wanted
    assert (operation["serving_epoch"] == operation["epoch"]) == committed
    clean = "done" if committed else "rolled_back"
    assert operation["phase"] == clean or (fault.victim == "HMM" and operation["phase"] == "failed"), operation["error"]


@pytest.mark.parametrize("fault", list(_params()))
def test_killed_in_a_change(bench: Faulty, rows: list[Row], fault: Fault) -> None:
    server = bench.server
    start = int(fault.way[0])
    change(server, start)
    settled(lambda: whole(server), SETTLED_WITHIN_S, "the server is whole before the change")
    with Pump(bench.load, bench.request, STREAMS) as pump, Pump(bench.load, bench.lengthy_request, LENGTHY) as crowd:
        settled(lambda: len(pump.streams) >= STREAMS, 10, "streams start")
        for stream in pump.streams[:STREAMS]:
            stream.wait_for_tokens(4, 60)
        operation_id, at = begin(bench, fault)
        operation = server.ended(operation_id)
        try:
            settled(lambda: whole(server), SETTLED_WITHIN_S, "the server is whole again")
        except TimeoutError as error:
            raise AssertionError(f"{error}: {imbalance(server.status())}\n{server.log_tail(150)}") from error
        whole_s = time.time() - at
        running = [stream for stream in pump.streams if stream.ids and not stream.done.done()]
        known = [len(stream.ids) for stream in running]
        for stream, tokens in zip(running, known, strict=True):
            stream.wait_for_tokens(min(tokens + 1, stream.wanted), BACK_WITHIN_S)
    streams = pump.streams + crowd.streams
    bench.load.wait(streams)
    for stream in streams:
        stream.check(bench.expected[stream.rid])
    no_token_yet = [stream for stream in crowd.streams if stream.sent_at < at < stream.first_at]
    gap, _ = longest_gap(pump.streams, at - 0.2, at + whole_s)
    silence = longest_silence(streams, at - 0.2, at + whole_s)
    gaps = [gap for stream in pump.streams for gap in stream.gaps()]
    rows.append(
        Row(
            fault=fault,
            phase=operation["phase"],
            silence_s=silence,
            gap_s=gap,
            median_ms=statistics.median(gaps) * 1e3,
            settled_s=whole_s,
            requests=len(streams),
            no_token_yet=len(no_token_yet),
            lost=sum(stream.lost for stream in streams),
        )
    )
    print(
        f"{fault.id}: {operation['phase']}, silence {silence:.2f} s, longest gap {gap:.2f} s, "
        f"whole after {whole_s:.2f} s: {operation['error']}"
    )
    assert gap < BACK_WITHIN_S
    assert silence < BACK_WITHIN_S
    assert len(no_token_yet) > 1, "nothing was being prefilled or waited in a queue"
    check_end(fault, operation, server.status())
    change(server, 6 - start)
    settled(lambda: imbalance(server.status()) is None, SETTLED_WITHIN_S, "the ledger agrees after the next change")


def test_an_old_abort_does_not_reach_what_is_sent_again(bench: Faulty) -> None:
    change(bench.server, 3)
    assert bench.server.post("/abort_request", {"abort_all": True}).status_code == 200
    # SGLang answers at once and tells rank 0 first: at the other ranks the abort may come after requests sent after it.
    time.sleep(1.0)
    streams = [bench.request(bench.load) for _ in range(9)]
    for stream in streams:
        stream.wait_for_tokens(4, 60)
    os.kill(bench.server.worker_pids()[2], 9)
    bench.load.wait(streams)
    for stream in streams:
        stream.check(bench.expected[stream.rid])
    assert any(len(stream.ranks) > 1 for stream in streams), "none was sent again"
    settled(lambda: whole(bench.server), SETTLED_WITHIN_S, "the server is whole again")


def test_without_an_hmm_changes_are_refused_and_serving_goes_on(bench: Faulty) -> None:
    """A stopped process cannot be replaced before it is gone, so there is time to ask."""
    change(bench.server, 2)
    pid = bench.server.status()["memory"]["pid"]
    os.kill(pid, 9)
    response = bench.server.post("/scale_elastic_ep", {"new_ep_size": 3, "wait": True})
    assert response.status_code == 503, response.text
    assert "HMM" in response.json()["error"] and "Serving goes on" in response.json()["error"]
    prompt = bench.cases[0]
    stream = bench.load.start(prompt.prompt, FAULTY_TOKENS).wait(60)
    stream.check(prompt.ids)
    change(bench.server, 3)
    assert bench.server.status()["memory"]["pid"] != pid
