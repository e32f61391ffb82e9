"""The analyser on logs whose figures are known, to the millisecond: a wrong figure cannot pass silently."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scaling.analyser import analyse, spread
from benchmarks.scaling.figures import Figures, Slo
from benchmarks.scaling.records import (
    ChangeRecord,
    DevicePeak,
    Load,
    MemorySample,
    RequestRecord,
    RunLog,
)

pytestmark = pytest.mark.process

SLO = Slo(ttft_s=0.5, tpot_s=0.1)
MS = 0.001


def stream(
    request_id: int, due: float, times: list[float], *, wanted: int | None = None, error: str | None = None, **fields
) -> RequestRecord:
    """A request whose tokens 0, 1, ... arrived at these times."""
    ended = fields.pop("ended_at", times[-1] if times else due)
    return RequestRecord(
        request_id=request_id,
        due_at=due,
        sent_at=fields.pop("sent_at", due),
        wanted=len(times) if wanted is None else wanted,
        arrivals=times,
        token_ids=[100 + i for i in range(len(times))],
        ended_at=ended,
        error=error,
        **fields,
    )


def steady(request_id: int, start: float, end: float, every: float = 0.05, **fields) -> RequestRecord:
    """Tokens from `start` to before `end`, evenly."""
    count = round((end - start) / every)
    return stream(request_id, start - every, [round(start + i * every, 6) for i in range(count)], **fields)


def figures(requests: list[RequestRecord], end: float = 60.0, **fields) -> Figures:
    changes = fields.pop("changes", [])
    settings = {name: fields.pop(name) for name in ("window_s", "stall_s") if name in fields}
    log = RunLog(
        arm="m", run="r", repetition=0, method="m", load=Load(lanes=1),
        load_ended_at=fields.pop("load_ended_at", end), ended_at=end, requests=requests, changes=changes, **fields,
    )  # fmt: skip
    return analyse(log, SLO, **settings)


def change(at: float, effective: float | None, ended: float, **fields) -> ChangeRecord:
    return ChangeRecord(requested_at=at, old_size=2, new_size=4, effective_at=effective, ended_at=ended, **fields)


def test_times_of_one_request() -> None:
    # Due at 1.0, sent 40 ms late; first token 120 ms after it was due; gaps 50, 50, 730, 50 ms.
    found = figures([stream(0, 1.0, [1.12, 1.17, 1.22, 1.95, 2.0], sent_at=1.04)])
    assert found.ttft.p50 == pytest.approx(0.120, abs=MS / 10)
    assert found.tpot.p50 == pytest.approx(0.880 / 4, abs=MS / 10)
    assert found.max_gaps.max == pytest.approx(0.730, abs=MS / 10)
    assert (found.requests, found.completed, found.failed, found.lost_tokens) == (1, 1, 0, 0)


def test_lost_tokens_are_failures_even_without_an_error() -> None:
    whole = stream(0, 1.0, [1.1, 1.15, 1.2])
    short = stream(1, 1.0, [1.1, 1.15], wanted=5)
    broken = stream(3, 1.0, [1.1], wanted=10, error="connection closed", ended_at=1.3)
    refused = stream(4, 1.0, [], wanted=10, error="refused")
    silent = stream(5, 1.0, [], wanted=4)
    found = figures([whole, short, broken, refused, silent])
    assert found.lost_tokens == 3 + 9 + 0 + 4
    assert (found.completed, found.failed) == (1, 4)
    assert (found.refused, found.aborted) == (2, 2)
    assert found.slo_attainment == pytest.approx(1 / 5)
    assert found.served.goodput == pytest.approx(1 / 60)


def test_more_tokens_than_were_wanted() -> None:
    found = figures([stream(0, 1.0, [1.1, 1.2, 1.3], wanted=2)])
    assert (found.doubled_tokens, found.lost_tokens, found.completed) == (1, 0, 0)


def test_a_broken_stream_waits_until_its_error() -> None:
    found = figures([stream(0, 1.0, [1.1, 1.15], wanted=9, error="gone", ended_at=3.65)])
    assert found.max_gaps.max == pytest.approx(2.5, abs=MS / 10)


def test_slo_needs_both_limits() -> None:
    good = stream(0, 0.0, [0.5, 0.6, 0.7])
    late = stream(1, 0.0, [0.501, 0.6, 0.7])
    slow = stream(2, 0.0, [0.1, 0.2, 0.301])
    single = stream(3, 0.0, [0.4])
    found = figures([good, late, slow, single], end=10.0)
    assert found.slo_attainment == 0.5
    assert found.served.goodput == pytest.approx(0.2)


def test_no_downtime_when_tokens_flow_or_nobody_waits() -> None:
    # Two streams that overlap; then ten seconds in which nobody asked for anything.
    found = figures([steady(0, 1.0, 5.0), steady(1, 3.0, 8.0), steady(2, 18.0, 20.0)], end=25.0)
    assert found.downtime_s == 0.0


def test_refusals_make_the_whole_silence_downtime() -> None:
    # Last token at 9.950; refused at 12 and 17; first token again at 20.050.
    requests = [steady(0, 1.0, 10.0), steady(3, 20.05, 30.0)]
    requests += [stream(i, at, [], wanted=5, error="refused") for i, at in ((1, 12.0), (2, 17.0))]
    found = figures(requests, end=40.0, stall_s=1.0)
    assert found.downtime_s == pytest.approx(20.05 - 9.95, abs=MS)


def test_an_abort_in_the_middle_of_others_costs_one_gap() -> None:
    aborted = stream(1, 2.0, [2.1, 2.15], wanted=9, error="gone", ended_at=5.02)
    found = figures([steady(0, 1.0, 10.0), aborted])
    assert found.downtime_s == pytest.approx(0.05, abs=MS)


def test_a_stall_counts_only_while_somebody_waits_and_only_beyond_the_threshold() -> None:
    # Silence from 9.950 to 16.000. A request waits in it from 12.250 on: 3.750 s, all of them downtime.
    requests = [steady(0, 1.0, 10.0), stream(1, 12.25, [16.0, 16.05])]
    assert figures(requests).downtime_s == pytest.approx(3.75, abs=MS)
    assert figures(requests, stall_s=4.0).downtime_s == 0.0
    # 900 ms of waiting are a pause, not an outage.
    short = [steady(0, 1.0, 10.0), stream(1, 12.25, [13.15, 13.2])]
    assert figures(short).downtime_s == 0.0


def test_an_outage_that_never_ends() -> None:
    requests = [steady(0, 1.0, 10.0), stream(1, 15.0, [], wanted=5, error="cancelled", ended_at=60.0)]
    assert figures(requests, end=60.0).downtime_s == pytest.approx(50.05, abs=MS)


def test_throughput_windows_of_a_change() -> None:
    # 20 tokens/s until the request at 20.0, 10 tokens/s for the 5 s of the change, 40 tokens/s after it.
    requests = [
        steady(0, 0.0, 20.0, every=0.05),
        steady(1, 20.0, 25.0, every=0.1),
        steady(2, 25.0, 60.0, every=0.025),
    ]
    found = figures(requests, changes=[change(20.0, 24.95, 26.0)], window_s=10.0)
    [one] = found.changes
    assert one.scale_latency_s == pytest.approx(5.0, abs=MS)
    assert one.before.tokens_per_s == pytest.approx(20.0, abs=0.2)
    assert one.during.tokens_per_s == pytest.approx(10.0, abs=0.2)
    assert one.after.tokens_per_s == pytest.approx(40.0, abs=0.2)
    assert one.during_over_before == pytest.approx(0.5, abs=0.01)
    assert (one.before.start, one.after.end) == (pytest.approx(10.0), pytest.approx(35.0))
    assert one.gain == pytest.approx(2.0, abs=0.05) and one.gaps.max == pytest.approx(0.1, abs=MS)


def test_requests_a_second_count_completed_ones_by_their_end() -> None:
    requests = [stream(i, float(i), [i + 0.5]) for i in range(10)]
    requests.append(stream(99, 3.0, [3.2], wanted=2))
    found = figures(requests, end=10.0)
    assert found.served.tokens_per_s == pytest.approx(1.1)


def test_scale_latency_waits_for_a_token_of_the_new_server() -> None:
    old = steady(0, 1.0, 40.0, generation=0)
    new = stream(1, 30.0, [30.4, 30.5], generation=1)
    [one] = figures([old, new], changes=[change(10.0, 29.0, 33.0, generation=1)]).changes
    assert one.scale_latency_s == pytest.approx(20.4, abs=MS)
    # A server that changed in place serves at its new size with its next token.
    [one] = figures([old, new], changes=[change(10.0, 11.02, 12.0)]).changes
    assert one.scale_latency_s == pytest.approx(1.05, abs=MS)


def test_a_change_that_failed_has_no_latency() -> None:
    [one] = figures([steady(0, 1.0, 40.0)], changes=[change(10.0, None, 12.0, error="no")]).changes
    assert one.scale_latency_s is None and one.error == "no"


def test_a_change_that_was_given_up_ends_then() -> None:
    [one] = figures([steady(0, 0.0, 60.0)], changes=[change(10.0, None, 40.0, error="no")], window_s=15.0).changes
    assert (one.during.start, one.during.end) == (pytest.approx(10.0), pytest.approx(40.0))
    assert (one.after.start, one.after.end) == (pytest.approx(40.0), pytest.approx(55.0))
    assert one.after.tokens_per_s == pytest.approx(one.before.tokens_per_s, rel=0.01)


def test_a_short_change_is_measured_over_two_seconds() -> None:
    [one] = figures([steady(0, 0.0, 40.0)], changes=[change(10.0, 10.1, 10.2)]).changes
    assert one.scale_latency_s == pytest.approx(0.1, abs=MS)
    assert (one.during.start, one.during.end) == (pytest.approx(10.0), pytest.approx(12.0))


def test_windows_of_two_changes_do_not_overlap() -> None:
    changes = [change(20.0, 24.95, 26.0), change(30.0, 31.0, 31.0)]
    first, second = figures([steady(0, 0.0, 50.0)], changes=changes, window_s=15.0).changes
    assert first.after.end == pytest.approx(30.0)
    assert second.before.start == pytest.approx(26.0)


def test_downtime_of_a_change_is_its_own() -> None:
    requests = [steady(0, 1.0, 10.0), stream(1, 12.0, [], error="refused", wanted=2), steady(2, 20.0, 50.0)]
    requests.append(stream(3, 5.02, [], error="refused", wanted=2))
    found = figures(requests, changes=[change(11.0, 19.0, 19.0)])
    [one] = found.changes
    # From the request for the change on: the silence before it is the run's, not the change's.
    assert one.downtime_s == pytest.approx(9.0, abs=MS)
    assert found.downtime_s == pytest.approx(20.0 - 9.95 + 0.05, abs=MS)


def test_memory() -> None:
    gib = 2**30
    samples = [MemorySample(t, gib * size) for t, size in ((1, 4), (3, 4), (5, 4), (11, 7), (12, 9), (21, 5), (25, 5))]
    found = figures(
        [steady(0, 0.0, 30.0)],
        end=30.0,
        load_ended_at=30.0,
        changes=[change(10.0, 12.0, 13.0)],
        memory=samples,
        device_memory=[
            DevicePeak(device=0, before=1000, peak=1000, after=600),
            DevicePeak(device=1, before=0, peak=309, after=300),
        ],
    )
    assert found.memory_bytes == 9 * gib
    assert found.changes[0].memory_over == pytest.approx(9 / 5 - 1)
    assert found.changes[0].memory_over_smaller == pytest.approx(9 / 4 - 1)
    assert found.device_memory_over == pytest.approx(0.03)


def test_memory_before_a_change_is_that_of_its_own_size() -> None:
    # 2 GiB, 4 GiB from the first change on, 2 GiB again after the second: neither has a peak.
    samples = [MemorySample(t, 2**30 * (4 if 20 <= t < 31 else 2)) for t in range(60)]
    changes = [change(19.5, 20.5, 21.0), change(29.5, 30.5, 31.0)]
    found = figures([steady(0, 0.0, 60.0)], end=60.0, changes=changes, memory=samples)
    assert [one.memory_over for one in found.changes] == [0.0, 0.0]


def test_an_empty_run() -> None:
    found = figures([], end=0.0)
    assert found.requests == 0 and found.slo_attainment is None and found.ttft.count == 0
    assert found.downtime_s == 0.0 and found.served.tokens_per_s == 0.0


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=60))
def test_percentiles_are_values_in_order(values: list[float]) -> None:
    found = spread(values)
    assert found.p50 is not None and found.p90 is not None and found.p99 is not None
    assert {found.p50, found.p90, found.p99, found.max} <= set(values)
    assert found.p50 <= found.p90 <= found.p99 <= max(values) == found.max
    assert sum(value <= found.p50 for value in values) >= len(values) / 2


@settings(deadline=None)  # a busy machine takes its time
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=12), st.integers(1, 50))
def test_cutting_tokens_off_never_improves_a_run(starts: list[tuple[int, int]], cut: int) -> None:
    """Completed requests, SLO and goodput cannot rise, lost tokens and failures cannot fall."""
    whole = [steady(i, float(s), s + length / 2) for i, (s, length) in enumerate(starts)]
    shorter = [stream(r.request_id, r.due_at, r.arrivals[: -cut or None], wanted=r.wanted) for r in whole]
    before, after = figures(whole), figures(shorter)
    assert after.completed <= before.completed and after.served.goodput <= before.served.goodput
    assert after.lost_tokens >= before.lost_tokens and after.failed >= before.failed
    assert after.served.tokens_per_s <= before.served.tokens_per_s
