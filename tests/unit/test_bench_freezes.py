"""From logs to targets: a freeze of the service, however short, moves figures beyond limits; nothing else does."""

from __future__ import annotations

import pytest

from benchmarks.scaling.experiments import EXPERIMENTS
from benchmarks.scaling.records import ChangeRecord, Load, MemorySample, RequestRecord, RunLog
from benchmarks.scaling.summary import Results, stat, summarise
from benchmarks.scaling.targets import TARGETS, Target, Verdict, judge

pytestmark = pytest.mark.process

AT = 10.03
FIRST_S, STEP_S, TOKENS = 0.06, 0.012, 40


def request(number: int, due: float, freeze: float) -> RequestRecord:
    """A token each 12 ms, the first after 60 ms; from `AT` on nothing happens for `freeze` seconds, then it goes on."""
    begun = AT + freeze if AT <= due < AT + freeze else due
    usual = [begun + FIRST_S + place * STEP_S for place in range(TOKENS)]
    arrivals = [at + freeze if at >= AT > due else at for at in usual]
    return RequestRecord(
        request_id=number, due_at=due, sent_at=due, wanted=TOKENS, arrivals=arrivals,
        token_ids=list(range(TOKENS)), ended_at=arrivals[-1],
    )  # fmt: skip


def run(freeze: float, repetition: int, *, lost: bool = False, memory: float = 1.0) -> RunLog:
    """20 seconds at 8 requests a second; a change of half a second, in which the freeze begins."""
    requests = [request(number, number / 8, freeze) for number in range(1, 160)]
    if lost:
        requests[70].error = "gone"
    held = [MemorySample(at / 50, int(2**30 * (memory if 10 <= at / 50 < 10.5 else 1))) for at in range(1000)]
    timings = {"preparing_ms": 400.0, "committing_ms": 20.0, "finishing_ms": 20.0}
    ended = 10.5 + freeze
    change = ChangeRecord(
        requested_at=10.0, old_size=1, new_size=2, effective_at=10.4 + freeze, ended_at=ended,
        detail={"pause_ms": {"0": 4.0}, "timings": timings},
    )  # fmt: skip
    return RunLog(
        arm="elastic", run="up at 0.8", repetition=repetition, method="elastic", load=Load(rate=8, share=0.8),
        load_ended_at=20.0, ended_at=21.0, requests=requests, changes=[change], memory=held,
        about={"machine": {}, "model": "m"},
    )  # fmt: skip


def verdicts(*logs: RunLog) -> dict[str, Verdict]:
    """By metric, of what was measured."""
    results = summarise("scale", EXPERIMENTS["scale"], logs)
    return {verdict.target.metric: verdict for verdict in judge(results) if verdict.value is not None}


def missed(*logs: RunLog) -> set[str]:
    return {metric for metric, verdict in verdicts(*logs).items() if not verdict.met}


def test_a_change_without_a_freeze_meets_everything() -> None:
    found = verdicts(*(run(0.0, repetition) for repetition in range(3)))
    assert len(found) >= 9
    assert [verdict for verdict in found.values() if not verdict.met] == []


@pytest.mark.parametrize(
    ("freeze", "figures"),
    [
        (0.1, {"gap_over_s"}),
        (0.5, {"gap_over_s", "worst_gap_over_limit", "ttft_during_over_before"}),
        (1.0, {"gap_over_s", "worst_gap_over_limit", "ttft_during_over_before", "scale_latency_s"}),
        (3.0, {"gap_over_s", "worst_gap_over_limit", "ttft_during_over_before", "during_over_before", "downtime_s"}),
    ],
)
def test_every_freeze_moves_figures_beyond_their_limits(freeze: float, figures: set[str]) -> None:
    assert figures <= missed(*(run(freeze, repetition) for repetition in range(3)))


def test_one_lost_request_in_one_repetition_is_enough() -> None:
    assert "failed" in missed(run(0, 0), run(0, 1, lost=True), run(0, 2))


def test_memory_that_peaks_for_a_moment() -> None:
    assert missed(*(run(0, repetition, memory=1.03) for repetition in range(3))) == {"memory_over"}


def test_what_was_not_measured_is_missed() -> None:
    results = summarise("scale", EXPERIMENTS["scale"], [run(0, 0)])
    found = {verdict.target.text: verdict for verdict in judge(results)}
    assert len(found) == sum(target.experiment == "scale" for target in TARGETS)
    gain = next(verdict for verdict in found.values() if verdict.target.metric == "gain")
    assert not gain.met and (gain.found, gain.outcome) == ("not measured", "**missed**")


def test_every_target_names_a_run_of_its_experiment() -> None:
    for target in TARGETS:
        rows = {f"{arm.name}: {each.name}" for arm in EXPERIMENTS[target.experiment].arms for each in arm.runs}
        rows |= {f"{row}, {way}" for row in rows for way in ("up", "down")}
        assert {target.row, *target.over} <= rows, target


def test_a_target_says_by_how_much() -> None:
    pause = Target(text="pause", experiment="e", row="r", metric="m", limit=0.01, unit="ms")
    verdict = Verdict(target=pause, value=0.0125, low=0.011, high=0.013, n=5)
    assert not verdict.met and verdict.wanted == "at most 10.0 ms"
    assert verdict.found == "12.5 ms [11.0 ms, 13.0 ms], n = 5" and verdict.outcome == "**missed** by 2.5 ms"
    gain = Target(text="gain", experiment="e", row="r", metric="m", limit=1.5, at_least=True, unit="x")
    assert Verdict(target=gain, value=1.5, n=1).outcome == "met"
    assert Verdict(target=gain, value=1.2, n=1).outcome == "**missed** by 0.30 x"


def test_the_best_baseline_that_ran_counts() -> None:
    rows = [
        {"name": "elastic: up at 0.8", "seconds": 1.0}, {"name": "cold-restart: up at 0.8", "seconds": 50.0},
        {"name": "replica: up at 0.8", "seconds": 25.0},
    ]  # fmt: skip
    from benchmarks.scaling.summary import Row

    results = Results(
        experiment="scale", slo=EXPERIMENTS["scale"].slo, about={}, differ=(0, 0),
        rows=[Row(name=str(row["name"]), method="", stats={"scale_latency_s": stat([float(row["seconds"])])})
              for row in rows],
    )  # fmt: skip
    [verdict] = [verdict for verdict in judge(results) if verdict.target.over and verdict.value is not None]
    assert verdict.value == pytest.approx(0.04) and verdict.met


def test_intervals() -> None:
    assert (stat([1.0, 2.0]).median, stat([1.0, 2.0]).low) == (1.5, None)
    found = stat([1.0, 2.0, 3.0, 4.0, 100.0])
    assert found.median == 3.0 and found.low == 1.0 and found.high == 100.0 and stat(found.values) == found
    narrow = stat([2.0] * 9 + [50.0])
    assert (narrow.low, narrow.median) == (2.0, 2.0) and narrow.high is not None and narrow.high < 50
