"""The decision as a function: bounds, monotony, holding, cooling down, stepping back, and a sentence for each."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticmoe_sglang.policy.capacity import RankModel
from elasticmoe_sglang.policy.decision import Action, Decision, PolicyState, Trial, changed, decide, held
from elasticmoe_sglang.policy.estimator import Snapshot
from elasticmoe_sglang.policy.settings import Autoscale, PolicySettings

pytestmark = pytest.mark.process

SLO = "ttft=1s,itl=50ms,attainment=0.9"
SETTINGS = PolicySettings(slo=SLO, autoscale=Autoscale.ON)
MODEL = RankModel(base_s=0.01, slope_s=0.001, kv_per_request=0.02, samples=100.0)
"""Within the SLO a rank runs 35 requests and makes 778 tokens/s."""
MOST = 8


def snapshot(**values: Any) -> Snapshot:
    """Two ranks, half used."""
    made: dict[str, Any] = {
        "ranks": 2, "slots": 64, "kv_use": 0.3, "waiting": 0, "waiting_least": 0, "running": 20,
        "arrivals_now": 7.0, "arrivals_fast": 7.0, "arrivals_slow": 7.0, "arrivals_seen": 70, "slow_s": 30.0,
        "output_tokens": 100.0, "output_spread": 0.5, "prompt_tokens": 100.0, "tokens_per_s": 700.0, "itl_s": 0.02,
        "first_ok": 200, "first_late": 0, "pace_ok": 200, "pace_late": 0, "attainment": 1.0,
        "goodput_tokens_per_s": 700.0, "models": {2: MODEL},
    }  # fmt: skip
    return Snapshot(**(made | values))


def at_rate(rate: float, **values: Any) -> Snapshot:
    """The same with `rate` requests a second, all of them served."""
    return snapshot(
        arrivals_now=rate, arrivals_fast=rate, arrivals_slow=rate, arrivals_seen=round(10 * rate),
        tokens_per_s=100 * rate, **values,
    )  # fmt: skip


def ask(
    seen: Snapshot | None, state: PolicyState | None = None, now: float = 1000.0, **options: Any
) -> tuple[Decision, PolicyState]:
    options = {"settings": SETTINGS, "max_ep_size": MOST} | options
    return decide(seen, state=state or PolicyState(), now=now, **options)


def test_what_fits_stays() -> None:
    decision, state = ask(at_rate(10.0))
    assert (decision.action, decision.desired) == (Action.NOTHING, 2)
    assert decision.because == "the load of 1000 tokens/s needs 2 ranks" and decision.inputs is not None
    assert state == PolicyState()


def test_it_grows_by_what_the_capacity_says() -> None:
    decision, state = ask(at_rate(40.0))
    # 4000 tokens/s, and a rank makes 778 of which nine tenths are used.
    assert (decision.action, decision.desired) == (Action.GROW, 6)
    assert "more than the" in decision.because and "6 ranks are needed" in decision.because
    assert state.trial is not None and (state.trial.before, state.trial.after) == (2, 6)


def test_a_queue_that_breaks_ttft_is_a_reason() -> None:
    decision, _ = ask(at_rate(10.0, waiting=30, waiting_least=30))
    assert decision.action is Action.GROW and "30 requests wait" in decision.because
    short, _ = ask(at_rate(10.0, waiting=2, waiting_least=2))
    assert short.action is Action.NOTHING


def test_without_any_knowledge_it_grows_by_one() -> None:
    seen = snapshot(models={}, output_tokens=0.0, waiting=10, waiting_least=10, tokens_per_s=0.0)
    assert ask(seen)[0].desired == 3


def test_missed_slos_lower_what_a_rank_is_taken_to_do() -> None:
    seen = at_rate(10.0, pace_ok=80, pace_late=20)
    decision, state = ask(seen)
    assert decision.desired == 3 and "20 of 100 requests missed their pace limit of 50 ms" in decision.because
    assert state.lowered is not None and state.lowered < 778
    # The same load on three ranks: a smaller size is known to be too small for it.
    after = at_rate(10.0, ranks=3, models={3: MODEL})
    assert ask(after, changed(state, 1005.0, SETTINGS), now=1100.0)[0].action is Action.NOTHING
    # Few misses may be chance.
    assert ask(at_rate(10.0, pace_ok=180, pace_late=20))[0].action is Action.NOTHING


def test_it_shrinks_with_margin_after_the_slow_window() -> None:
    seen = at_rate(5.0, ranks=4, models={4: MODEL}, kv_use=0.1)
    decision, _ = ask(seen)
    assert (decision.action, decision.desired) == (Action.SHRINK, 2)
    early, _ = ask(msgspec.structs.replace(seen, slow_s=12.0))
    assert early.action is Action.NOTHING and "too short a time" in early.because
    full = msgspec.structs.replace(seen, kv_use=0.5)
    assert ask(full)[0].desired == 3
    late = msgspec.structs.replace(seen, first_ok=80, first_late=20)
    assert ask(late)[0].action is not Action.SHRINK


def test_idle_ranks_go_by_half_to_the_smallest_size() -> None:
    seen = at_rate(0.0, ranks=8, running=0, models={}, output_tokens=0.0, kv_use=0.0)
    assert ask(seen)[0].desired == 4
    kept, _ = ask(seen, settings=msgspec.structs.replace(SETTINGS, min_ep_size=6))
    assert kept.desired == 6


def test_cooling_down_and_hysteresis() -> None:
    state = changed(PolicyState(), 999.0, SETTINGS)
    for seen in (at_rate(40.0), at_rate(5.0, ranks=4, models={4: MODEL}, kv_use=0.1)):
        decision, _ = ask(seen, state)
        assert decision.action is Action.NOTHING and "cooling down" in decision.because
    # What a size was grown for is not given up at once: between the two limits nothing happens.
    grown = ask(at_rate(16.0))[0].desired
    assert grown == 3
    assert ask(at_rate(16.0, ranks=3, models={3: MODEL}), now=2000.0)[0].action is Action.NOTHING


def test_a_forecast_is_a_floor() -> None:
    expected: dict[str, Any] = {"expected_tokens_per_s": 4000.0, "expected_because": "the load repeats every 600 s"}
    decision, _ = ask(at_rate(10.0, **expected))
    assert decision.desired == 6 and "the load repeats every 600 s" in decision.because
    without = msgspec.structs.replace(SETTINGS, forecast=False)
    assert ask(at_rate(10.0, **expected), settings=without)[0].action is Action.NOTHING
    high = at_rate(5.0, ranks=6, models={6: MODEL}, kv_use=0.05, **expected)
    assert ask(high)[0].action is Action.NOTHING, "it shrank below what is expected"


def trial(**values: Any) -> Trial:
    made: dict[str, Any] = {
        "due": 990.0, "before": 2, "after": 4, "tokens_per_s": 1000.0, "load": 2000.0, "waiting": 50,
        "late_share": 0.5,
    }  # fmt: skip
    return Trial(**(made | values))


def test_growing_that_did_not_pay_is_taken_back_once_and_held() -> None:
    worse = at_rate(20.0, ranks=4, waiting=60, waiting_least=60, models={2: MODEL, 4: MODEL})
    worse = msgspec.structs.replace(worse, tokens_per_s=950.0)
    decision, state = ask(worse, PolicyState(trial=trial()))
    assert (decision.action, decision.desired) == (Action.STEP_BACK, 2)
    assert "growing from 2 to 4 ranks did not pay: 950 tokens/s instead of 1000" in decision.because
    assert (state.unpaid, state.unpaid_until, state.trial) == (2, 1600.0, None)
    back = msgspec.structs.replace(worse, ranks=2)
    refused, state = ask(back, changed(state, 1001.0, SETTINGS), now=1100.0)
    assert refused.action is Action.NOTHING and "did not pay" in refused.because
    again, _ = ask(back, state, now=1601.0)
    assert again.action is Action.GROW


@pytest.mark.parametrize(
    "values",
    [
        {"tokens_per_s": 1900.0},  # it did pay
        {"waiting": 0, "waiting_least": 0},  # the queue is gone
        {"arrivals_fast": 5.0},  # another load
        {"ranks": 3},  # somebody has changed it meanwhile
    ],
)
def test_growing_that_paid_or_cannot_be_judged_stays(values: dict[str, Any]) -> None:
    seen = at_rate(20.0, ranks=4, waiting=60, waiting_least=60, models={2: MODEL, 4: MODEL})
    seen = msgspec.structs.replace(seen, **{"tokens_per_s": 950.0, **values})
    decision, state = ask(seen, PolicyState(trial=trial()))
    assert decision.action is not Action.STEP_BACK and state.unpaid is None


def test_growing_for_misses_that_have_another_cause_is_taken_back() -> None:
    same = at_rate(20.0, ranks=4, models={2: MODEL, 4: MODEL}, first_ok=50, first_late=50, itl_s=0.02)
    cause = trial(waiting=0, tokens_per_s=2000.0)
    decision, _ = ask(same, PolicyState(trial=cause))
    assert decision.action is Action.STEP_BACK
    assert "did not pay: 50% of requests miss the SLO instead of 50%, with an ITL of 20 ms" in decision.because
    better = msgspec.structs.replace(same, first_ok=80, first_late=20)
    assert ask(better, PolicyState(trial=cause))[0].action is not Action.STEP_BACK


def test_a_trial_is_due_only_after_its_change_has_ended() -> None:
    _, state = ask(at_rate(40.0))
    assert state.trial is not None and state.trial.due == float("inf")
    ended = changed(state, 1003.0, SETTINGS)
    assert ended.trial is not None and ended.trial.due == 1003.0 + SETTINGS.drain_s + SETTINGS.fast_window_s
    assert held(ended, 1500.0).trial is None


def test_reasons_to_do_nothing() -> None:
    overload = at_rate(40.0)
    for options, words in (
        ({"busy": "a change to 3 ranks is preparing"}, "a change to 3 ranks"),
        ({"settings": PolicySettings()}, "there is no SLO"),
        ({"state": held(PolicyState(), 1060.0)}, "a manual request holds the policy for 60 s more"),
        ({"max_ep_size": 2}, "all 2 ranks are active"),
    ):
        decision, _ = ask(overload, **options)
        assert decision.action is Action.NOTHING and words in decision.because
        assert decision.desired == 2
    assert ask(None)[0].because == "nothing was measured yet"


counts = st.integers(0, 500)
rates = st.floats(0, 200)
models = st.builds(
    RankModel,
    base_s=st.floats(1e-4, 0.2),
    slope_s=st.floats(0, 0.05),
    kv_per_request=st.floats(0, 1),
    full_tokens_per_s=st.none() | st.floats(1, 1e4),
    samples=st.floats(1, 180),
)
snapshots = st.builds(
    Snapshot,
    ranks=st.integers(1, MOST),
    slots=st.none() | st.integers(1, 256),
    kv_use=st.none() | st.floats(0, 1),
    waiting=st.just(0),
    waiting_least=st.just(0),
    running=counts,
    arrivals_now=rates,
    arrivals_fast=rates,
    arrivals_slow=rates,
    arrivals_seen=counts,
    slow_s=st.floats(1, 30),
    output_tokens=st.just(0.0) | st.floats(1, 4000),
    output_spread=st.floats(0, 3),
    prompt_tokens=st.floats(0, 4000),
    tokens_per_s=st.floats(0, 1e5),
    itl_s=st.none() | st.floats(1e-3, 1),
    first_ok=counts,
    first_late=counts,
    pace_ok=counts,
    pace_late=counts,
    attainment=st.none() | st.floats(0, 1),
    goodput_tokens_per_s=st.floats(0, 1e5),
    models=st.dictionaries(st.integers(1, MOST), models, max_size=4),
    expected_tokens_per_s=st.none() | st.floats(0, 1e5),
    expected_because=st.just("so"),
)
states = st.builds(
    PolicyState,
    changed_at=st.floats(0, 1000),
    held_until=st.just(-1.0) | st.floats(900, 1100),
    lowered=st.none() | st.floats(1, 1e4),
    lowered_at=st.floats(0, 1000),
    lowered_ranks=st.integers(0, MOST),
    trial=st.none() | st.builds(trial, before=st.integers(1, 3), after=st.integers(4, MOST), due=st.floats(900, 1100)),
    unpaid=st.none() | st.integers(1, MOST),
    unpaid_until=st.floats(900, 1600),
)
limits = st.builds(
    PolicySettings,
    slo=st.sampled_from([SLO, "ttft=500ms", "itl=20ms,attainment=0.99"]),
    autoscale=st.just(Autoscale.ON),
    min_ep_size=st.integers(1, MOST),
    forecast=st.booleans(),
)


@settings(max_examples=300)
@given(snapshots, counts, limits, states)
def test_bounds_and_a_reason(seen: Snapshot, queue: int, chosen: PolicySettings, state: PolicyState) -> None:
    seen = msgspec.structs.replace(seen, waiting=queue, waiting_least=queue)
    decision, after = ask(seen, state, settings=chosen)
    assert decision.because and decision.ranks == seen.ranks
    match decision.action:
        case Action.NOTHING:
            assert decision.desired == seen.ranks and after.changed_at == state.changed_at
        case Action.GROW:
            assert seen.ranks < decision.desired <= MOST
        case Action.SHRINK | Action.STEP_BACK:
            assert chosen.min_ep_size <= decision.desired < seen.ranks
    assert ask(seen, state, settings=chosen) == (decision, after), "it is no pure function"


@settings(max_examples=300)
@given(snapshots, counts, limits, states)
def test_sizes_are_whole_replicas(seen: Snapshot, queue: int, chosen: PolicySettings, state: PolicyState) -> None:
    """Of two ranks each."""
    most = 2 * MOST
    seen = msgspec.structs.replace(seen, ranks=2 * seen.ranks, waiting=queue, waiting_least=queue)
    unpaid = state.unpaid and 2 * state.unpaid
    state = msgspec.structs.replace(state, unpaid=unpaid, outgrown=2 * state.outgrown, trial=None)
    decision, _ = ask(seen, state, settings=chosen, max_ep_size=most, replica_size=2)
    assert decision.desired % 2 == 0 and 2 <= decision.desired <= most
    if decision.action is Action.GROW:
        assert decision.desired > seen.ranks
    if decision.action is Action.SHRINK:
        assert chosen.min_ep_size <= decision.desired < seen.ranks


@settings(max_examples=300)
@given(snapshots, counts, counts, limits, states)
def test_a_longer_queue_never_gives_fewer_ranks(
    seen: Snapshot, one: int, other: int, chosen: PolicySettings, state: PolicyState
) -> None:
    state = msgspec.structs.replace(state, trial=None)  # that a queue stays is what shows that growing did not pay
    desired = [
        ask(msgspec.structs.replace(seen, waiting=n, waiting_least=n), state, settings=chosen)[0].desired
        for n in sorted((one, other))
    ]
    assert desired[0] <= desired[1]


@settings(max_examples=200)
@given(snapshots, counts, limits, states, st.booleans())
def test_no_action_while_held_or_busy(
    seen: Snapshot, queue: int, chosen: PolicySettings, state: PolicyState, busy: bool
) -> None:
    seen = msgspec.structs.replace(seen, waiting=queue, waiting_least=queue)
    state = state if busy else held(state, 1000.5)
    decision, after = ask(seen, state, settings=chosen, busy="a change runs" if busy else None)
    assert decision.action is Action.NOTHING and after == state


@given(snapshots, limits)
def test_no_action_during_a_cool_down(seen: Snapshot, chosen: PolicySettings) -> None:
    decision, _ = ask(seen, PolicyState(changed_at=999.9), settings=chosen)
    assert decision.action is Action.NOTHING or seen.ranks < chosen.min_ep_size
