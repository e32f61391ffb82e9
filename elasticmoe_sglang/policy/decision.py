"""The decision: a pure function of what is measured, the settings, the last state and the time.

The fast loop grows: when the load needs more ranks than there are, when the queue breaks the TTFT limit, or when too
few requests meet the SLO; by as many ranks as the measured capacity says. It shrinks when a smaller size would meet the
SLO with margin over the slow window. The slow loop's forecast sets a floor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from elasticmoe_sglang.policy.capacity import RankCapacity, rank_capacity
from elasticmoe_sglang.policy.estimator import NOW_S, Snapshot
from elasticmoe_sglang.policy.settings import PolicySettings, Slo

# A size of n ranks that run b requests each is used up to 1 - x / sqrt(n * b) of its capacity: the spread of the number
# of running requests is about its square root. To grow at, to size for, and to shrink to.
_GROW, _SIZE, _SHRINK = (0.5, 0.98), (1.0, 0.94), (1.5, 0.88)
_LEAST_USE = 0.3
_UNKNOWN_RUNNING = 16.0
_SURE, _QUITE_SURE = 2.0, 3.0
"""Standard errors by which the load in the fast window, and in the last seconds, must exceed what fits, to count."""
_FALLING = 0.8
"""Below this share of the slow window's load the fast window's shows that it still falls."""
_QUEUE_SHARE = 0.5
"""Share of the TTFT limit that the queue may take."""
_FEWEST_JUDGED = 5
_KV_AFTER = 0.85
_RELAX_PER_S = 0.01 / 60
"""Growth of a capacity that was lowered after the SLO was missed below it."""
_PAID_SHARE = 0.25
"""Of the predicted gain, that growing has to bring."""
_SAME_LOAD = 0.8
_OUTGROWN_S, _OUTGROWN_SHARE = 900.0, 0.75
"""For so long a size that was outgrown is not returned to, unless the load has fallen to this share."""


class Action(str, Enum):
    """nothing; grow, shrink; step_back: undo growing that did not pay."""

    NOTHING = "nothing"
    GROW = "grow"
    SHRINK = "shrink"
    STEP_BACK = "step_back"


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """One decision and its inputs.

    Attributes:
        at: Unix time in seconds (in the pure function: the time it was given).
        ranks, desired: active ranks, and how many there should be; equal for `nothing`.
        because: one sentence.
        acted: the change was requested; False in shadow mode, for `nothing`, and where it was refused.
    """

    at: float
    action: Action
    ranks: int
    desired: int
    because: str
    inputs: Snapshot | None = None
    acted: bool = False


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """Growing that is to be judged at `due`, with what was measured when it was decided."""

    due: float
    before: int
    after: int
    tokens_per_s: float
    load: float
    waiting: int
    late_share: float


class PolicyState(msgspec.Struct, frozen=True, kw_only=True):
    """What one decision leaves to the next.

    Attributes:
        changed_at: when the last change ended. held_until: no action before, after a manual request.
        lowered: tokens a second of a rank at which `lowered_ranks` missed the SLO unexpectedly at `lowered_at`.
        unpaid: not to grow beyond this size until `unpaid_until`.
        outgrown: the size that was too small at `outgrown_at`, for a load that reached `outgrown_load` tokens a second.
    """

    changed_at: float = -math.inf
    held_until: float = -math.inf
    lowered: float | None = None
    lowered_at: float = -math.inf
    lowered_ranks: int = 0
    trial: Trial | None = None
    unpaid: int | None = None
    unpaid_until: float = -math.inf
    outgrown: int = 0
    outgrown_load: float = 0.0
    outgrown_at: float = -math.inf


class _View:
    """The numbers that the rules below share, for one snapshot."""

    def __init__(
        self,
        snapshot: Snapshot,
        slo: Slo,
        settings: PolicySettings,
        state: PolicyState,
        capacity: int,
        now: float,
        step: int = 1,
    ) -> None:
        self.now, self.s, self.slo, self.settings, self.state = now, snapshot, slo, settings, state
        self.most = capacity
        self.step = step
        self.least = min(self.possible(settings.min_ep_size), capacity)
        output = snapshot.output_tokens
        self.fast, self.slow = snapshot.arrivals_fast * output, snapshot.arrivals_slow * output
        self.now_load = snapshot.arrivals_now * output
        self.latest = max(self.fast, self.now_load)
        seen = max(1, snapshot.arrivals_seen)
        self.error = math.sqrt((1 + snapshot.output_spread**2) / seen)
        self.now_error = math.sqrt((1 + snapshot.output_spread**2) / max(1.0, snapshot.arrivals_now * NOW_S))
        slow_seen = max(1.0, snapshot.arrivals_slow * snapshot.slow_s)
        self.slow_error = math.sqrt((1 + snapshot.output_spread**2) / slow_seen)
        self.backlog = snapshot.waiting * output / settings.drain_s
        self.expected = (snapshot.expected_tokens_per_s or 0.0) if settings.forecast else 0.0

    def possible(self, size: int) -> int:
        """The smallest size there can be, not below this one."""
        return -(-size // self.step) * self.step

    def capacity(self, size: int) -> RankCapacity | None:
        """Of each rank."""
        found = rank_capacity(self.s.models, size, itl_limit_s=self.slo.itl_s, slots=self.s.slots)
        if found is None or self.state.lowered is None or size > self.state.lowered_ranks:
            return found
        lowered = self.state.lowered * (1 + _RELAX_PER_S * (self.now - self.state.lowered_at))
        return RankCapacity(tokens_per_s=min(found.tokens_per_s, lowered), running=found.running)

    def fits(self, size: int, use: tuple[float, float]) -> float | None:
        """Tokens a second of all ranks up to which a size is to be used; None: not known."""
        rank = self.capacity(size)
        if rank is None:
            return None
        together = size * (rank.running or _UNKNOWN_RUNNING)
        share = min(max(1 - use[0] / math.sqrt(together), _LEAST_USE), use[1])
        return size * rank.tokens_per_s * share

    def size_for(self, load: float, *, above: int = 0) -> int:
        """The smallest size, larger than `above`, that is sized for a load; the maximum where none is, and the next one
        where nothing is known of what a rank can do."""
        larger = self.possible(above + 1)
        if self.capacity(self.s.ranks) is None:
            return min(larger, self.most)
        for size in range(max(larger, self.least), self.most, self.step):
            fits = self.fits(size, _SIZE)
            if fits is not None and fits >= load:
                return size
        return self.most

    def queue_wait_s(self) -> float:
        """Until the queue's last request starts, at the rate that the ranks can do, or else do.

        One request for each rank is no queue: it is the next to be prefilled.
        """
        queue = self.s.waiting_least - self.s.ranks
        if queue <= 0:
            return 0.0
        rank = self.capacity(self.s.ranks)
        rate = max(self.s.tokens_per_s, 0.0 if rank is None else self.s.ranks * rank.tokens_per_s)
        # Until something has ended, lengths are not known.
        return queue * self.s.output_tokens / rate if rate > 0 and self.s.output_tokens > 0 else math.inf


def decide(
    snapshot: Snapshot | None,
    settings: PolicySettings,
    state: PolicyState,
    now: float,
    *,
    max_ep_size: int,
    replica_size: int = 1,
    busy: str | None = None,
) -> tuple[Decision, PolicyState]:
    """What to do now.

    Args:
        now: seconds, on the clock of the state's times.
        replica_size: of which all sizes are multiples.
        busy: what is going on that forbids any action, such as a change that runs; None: nothing is.

    Returns:
        The decision, and the state for the next one. Growing and stepping back are noted in the state as if they are
        carried out; `changed` is to be called when the change has ended.
    """
    ranks = snapshot.ranks if snapshot is not None else 0

    def nothing(because: str) -> Decision:
        return Decision(at=now, action=Action.NOTHING, ranks=ranks, desired=ranks, because=because, inputs=snapshot)

    slo = settings.objective
    if snapshot is None:
        return nothing("nothing was measured yet"), state
    if slo is None:
        return nothing("there is no SLO"), state
    if busy is not None:
        return nothing(busy), state
    if now < state.held_until:
        return nothing(f"a manual request holds the policy for {state.held_until - now:.0f} s more"), state
    view = _View(snapshot, slo, settings, state, max_ep_size, now, replica_size)
    if now < state.outgrown_at + _OUTGROWN_S and view.slow > state.outgrown_load:
        # A burst that has just begun is larger than what was measured when it was seen.
        view.state = state = msgspec.structs.replace(state, outgrown_load=view.slow)
    if ranks < view.least:
        because = f"{_ranks(ranks)} are fewer than the smallest size allowed, {view.least}"
        return _grown(view, view.least, because, trial=False, forecast=True)
    trial = state.trial
    if trial is not None and now >= trial.due:
        unpaid = _unpaid(view, trial)
        state = msgspec.structs.replace(state, trial=None)
        if unpaid is not None and ranks == trial.after and trial.before >= view.least:
            return _stepped_back(view, trial, unpaid, state)
        view.state = state
    needs = list(_needs(view))
    if needs:
        return _grow(view, needs)
    return _shrink_or_not(view), state


def changed(state: PolicyState, now: float, settings: PolicySettings) -> PolicyState:
    """The state after a change, of whatever cause, has ended now. Growing is judged once its effect is measured."""
    trial = state.trial
    if trial is not None:
        trial = msgspec.structs.replace(trial, due=now + settings.drain_s + settings.fast_window_s)
    return msgspec.structs.replace(state, changed_at=now, trial=trial)


def held(state: PolicyState, until: float) -> PolicyState:
    """The state after a manual request: nothing is done until then, and no growing is judged."""
    return msgspec.structs.replace(state, held_until=max(until, state.held_until), trial=None)


# -- growing ----------------------------------------------------------------------------------------------------------


class _Need(NamedTuple):
    """A size that something asks for, and why.

    Attributes:
        unexpected: the load should fit. It counts only when the queue from before the last change has had its time.
        missed: because requests missed the SLO. forecast: the load is not there yet.
    """

    size: int
    because: str
    unexpected: bool = False
    missed: bool = False
    forecast: bool = False


def _needs(view: _View) -> Iterator[_Need]:
    """Every reason to grow beyond the active ranks. A longer queue never removes a reason, and makes none smaller."""
    s, slo = view.s, view.slo
    limit = view.fits(s.ranks, _GROW)
    wait = view.queue_wait_s()
    # The shortest window that is surely above the longer ones.
    load = sure = view.slow * (1 - view.slow_error)
    for rate, error in ((view.fast, _SURE * view.error), (view.now_load, _QUITE_SURE * view.now_error)):
        if rate * (1 - error) > max(sure, view.slow):
            load, sure = rate, rate * (1 - error)
    load = max(load, view.slow)
    if wait > _QUEUE_SHARE * (slo.ttft_s or 1.0):
        text = f"{s.waiting} requests wait, the last of them for about {_seconds(wait)}"
        size = view.size_for(max(load, view.latest, s.tokens_per_s) + view.backlog)
        # Where this size should work the queue off, it is given the time to.
        yield _Need(max(size, min(s.ranks + view.step, view.most)), text, unexpected=size <= s.ranks)
    if limit is not None and sure > limit:
        text = f"the load of {load:.0f} tokens/s is more than the {limit:.0f} that {_ranks(s.ranks)} are used up to"
        yield _Need(view.size_for(load + view.backlog, above=s.ranks), text)
    if limit is not None and view.expected > limit:
        text = f"{view.expected:.0f} tokens/s are expected ({s.expected_because}), and {limit:.0f} fit"
        yield _Need(view.size_for(view.expected, above=s.ranks), text, forecast=True)
    for late, ok, name, what in (
        (s.first_late, s.first_ok, "first token", slo.ttft_s),
        (s.pace_late, s.pace_ok, "pace", slo.itl_s),
    ):
        if _too_many(late, late + ok, slo.attainment):
            text = f"{late} of {late + ok} requests missed their {name} limit" + (
                f" of {_seconds(what)}" if what else ""
            )
            yield _Need(view.size_for(load + view.backlog, above=s.ranks), text, unexpected=True, missed=True)


def _too_many(late: int, judged: int, attainment: float) -> bool:
    """More are late than the SLO allows, by more than chance."""
    allowed = (1 - attainment) * judged
    return judged >= _FEWEST_JUDGED and late > allowed + math.sqrt(allowed * attainment)


def _grow(view: _View, needs: Sequence[_Need]) -> tuple[Decision, PolicyState]:
    """Grow for the largest need whose cool-down is over."""
    s, state, now = view.s, view.state, view.now
    largest = max(needs, key=lambda need: need.size)
    if s.ranks >= view.most:
        return _nothing(view, f"{largest.because}, and all {_ranks(view.most)} are active"), state
    if state.unpaid is not None and now < state.unpaid_until and s.ranks >= state.unpaid:
        left = state.unpaid_until - now
        text = f"growing beyond {_ranks(state.unpaid)} did not pay; tried again in {left:.0f} s"
        return _nothing(view, f"{largest.because}, but {text}"), state
    cool_down_s = view.settings.grow_cool_down_s
    # What a queue has done to those who came while it was there is no reason to grow once more.
    waits = {need: state.changed_at + cool_down_s + view.settings.drain_s * need.unexpected - now for need in needs}
    ready = [_lowering(view, need) if need.missed else need for need in needs if waits[need] <= 0]
    if not ready:
        return _nothing(view, f"{largest.because}; cooling down for {waits[largest]:.0f} s"), state
    need = max(ready, key=lambda need: need.size)
    size = need.size
    if state.unpaid is not None and now < state.unpaid_until:
        size = min(size, state.unpaid)
    return _grown(view, size, need.because, trial=True, forecast=need.forecast)


def _lowering(view: _View, need: _Need) -> _Need:
    """The SLO is missed: where the load should have fitted, a rank can do less than was thought, from now on."""
    s, limit = view.s, view.fits(view.s.ranks, _GROW)
    rank = view.capacity(s.ranks)
    if rank is None or limit is None or not 0 < view.slow < limit or view.latest >= limit:
        return need
    lowered = rank.tokens_per_s * view.slow / limit
    view.state = msgspec.structs.replace(view.state, lowered=lowered, lowered_at=view.now, lowered_ranks=s.ranks)
    text = f"{need.because}, though {view.slow:.0f} tokens/s should fit: a rank is now taken to do {lowered:.0f}"
    return need._replace(size=view.size_for(view.slow + view.backlog, above=s.ranks), because=text)


def _grown(
    view: _View, size: int, because: str, *, trial: bool, forecast: bool = False
) -> tuple[Decision, PolicyState]:
    s, state = view.s, view.state
    text = f"{because}; {_ranks(size)} are needed"
    if trial:
        made = Trial(
            due=math.inf,
            before=s.ranks,
            after=size,
            tokens_per_s=s.tokens_per_s,
            load=view.slow,
            waiting=s.waiting,
            late_share=_late_share(s),
        )
        state = msgspec.structs.replace(state, trial=made)
    if not forecast:
        state = msgspec.structs.replace(state, outgrown=s.ranks, outgrown_load=view.slow, outgrown_at=view.now)
    return Decision(at=view.now, action=Action.GROW, ranks=s.ranks, desired=size, because=text, inputs=s), state


# -- does growing pay? ------------------------------------------------------------------------------------------------


def _unpaid(view: _View, trial: Trial) -> str | None:
    """Why growing did not pay; None: it did, or the load is another one."""
    s = view.s
    if view.fast < _SAME_LOAD * trial.load:
        return None
    wait_limit = _QUEUE_SHARE * (view.slo.ttft_s or 1.0)
    served_before, served = trial.tokens_per_s, s.tokens_per_s
    predicted = min(served_before * trial.after / trial.before, max(view.fast, served_before))
    queue_stays = view.queue_wait_s() > wait_limit and s.waiting >= trial.waiting / 2
    if trial.waiting and queue_stays and served < served_before + _PAID_SHARE * (predicted - served_before):
        return f"{served:.0f} tokens/s instead of {served_before:.0f}, and {predicted:.0f} were predicted"
    judged, late = s.first_ok + s.first_late + s.pace_ok + s.pace_late, _late_share(s)
    missed = not trial.waiting and trial.late_share > 1 - view.slo.attainment and judged >= _FEWEST_JUDGED
    # What is missed for another reason than load, such as prompts that take too long, is missed at any size.
    if missed and late > (1 - _PAID_SHARE * (1 - trial.before / trial.after)) * trial.late_share:
        itl = "" if s.itl_s is None else f", with an ITL of {_seconds(s.itl_s)}"
        return f"{late:.0%} of requests miss the SLO instead of {trial.late_share:.0%}{itl}"
    return None


def _stepped_back(view: _View, trial: Trial, unpaid: str, state: PolicyState) -> tuple[Decision, PolicyState]:
    hold_s = view.settings.unpaid_hold_s
    state = msgspec.structs.replace(state, unpaid=trial.before, unpaid_until=view.now + hold_s)
    text = f"growing from {trial.before} to {_ranks(trial.after)} did not pay: {unpaid}"
    decision = Decision(
        at=view.now,
        action=Action.STEP_BACK,
        ranks=view.s.ranks,
        desired=trial.before,
        because=f"{text}; back to {_ranks(trial.before)}, and no growing beyond for {hold_s:.0f} s",
        inputs=view.s,
    )
    return decision, state


# -- shrinking --------------------------------------------------------------------------------------------------------


def _shrink_or_not(view: _View) -> Decision:
    s, settings = view.s, view.settings
    if s.ranks <= view.least:
        return _nothing(view, f"the load of {view.slow:.0f} tokens/s is served by the smallest size allowed")
    size = _smaller(view)
    if size is not None and 0 < view.fast < _FALLING * view.slow and view.fast * (1 + view.error) < view.slow:
        text = f"the load falls, from {view.slow:.0f} to {view.fast:.0f} tokens/s; waiting to see how far"
        return _nothing(view, text)
    if size is None:
        return _nothing(view, f"the load of {view.slow:.0f} tokens/s needs {_ranks(s.ranks)}")
    fits = view.fits(size, _SHRINK)
    text = f"{view.slow:.0f} tokens/s fit {_ranks(size)}" + ("" if fits is None else f", used up to {fits:.0f}")
    for left, why in (
        (view.state.changed_at + settings.shrink_cool_down_s - view.now, "cooling down for"),
        (settings.slow_window_s - s.slow_s, "measured for too short a time, waiting for"),
    ):
        if left > 0:
            return _nothing(view, f"{text}; {why} {left:.0f} s")
    return Decision(at=view.now, action=Action.SHRINK, ranks=s.ranks, desired=size, because=text, inputs=s)


def _smaller(view: _View) -> int | None:
    """The smallest size that would hold the SLO with margin."""
    s = view.s
    if _late_share(s) > 1 - view.slo.attainment:
        return None
    # Lengths are known of requests that have ended, and at first only short ones have.
    slow = max(view.slow * (1 + view.slow_error), s.tokens_per_s) + view.backlog
    too_small = 0
    surely = view.slow * (1 + _SURE * view.slow_error)
    if view.now < view.state.outgrown_at + _OUTGROWN_S and surely > _OUTGROWN_SHARE * view.state.outgrown_load:
        too_small = view.state.outgrown
    # By half at most: what is known of this size says less of much smaller ones.
    for size in range(view.possible(max(view.least, too_small + 1, -(-s.ranks // 2))), s.ranks, view.step):
        if s.kv_use is not None and s.kv_use * s.ranks / size > _KV_AFTER:
            continue
        if slow <= 0 and view.expected <= 0 and not s.running:
            return size
        shrink, grow, sized = (view.fits(size, use) for use in (_SHRINK, _GROW, _SIZE))
        if shrink is None or grow is None or sized is None:
            continue
        if slow <= shrink and view.fast + view.backlog <= grow and view.expected <= sized:
            return size
    return None


def _late_share(s: Snapshot) -> float:
    first, pace = s.first_ok + s.first_late, s.pace_ok + s.pace_late
    return max(s.first_late / first if first else 0.0, s.pace_late / pace if pace else 0.0)


def _nothing(view: _View, because: str) -> Decision:
    ranks = view.s.ranks
    return Decision(at=view.now, action=Action.NOTHING, ranks=ranks, desired=ranks, because=because, inputs=view.s)


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"


def _seconds(value: float) -> str:
    if math.isinf(value):
        return "an unknown time"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"
