"""Drives the policy in the coordinator's event loop: measure, decide, ask for a change, remember why."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from elasticmoe_sglang.coordinator.coordinator import Coordinator
from elasticmoe_sglang.coordinator.status import Operation, Phase
from elasticmoe_sglang.errors import ElasticMoEError, OperationInProgress
from elasticmoe_sglang.planner import Cause, ScaleTo, Target
from elasticmoe_sglang.policy.decision import Action, Decision, PolicyState, changed, decide, held
from elasticmoe_sglang.policy.estimator import Estimator, Quantiles, Sample, Snapshot
from elasticmoe_sglang.policy.meter import RequestMeter
from elasticmoe_sglang.policy.settings import DECISIONS_KEPT, Autoscale, PolicySettings, check_sizes
from elasticmoe_sglang.policy.settings import changed as settings_changed
from elasticmoe_sglang.policy.view import PolicyView

logger = logging.getLogger(__name__)

TICK_S = 1.0
_REFUSED_WAIT_S = 10.0
"""Without actions after a change of the policy's was refused or failed."""
OWN = "policy-"
"""What the ids of its own operations begin with."""


class PolicyController:
    """Its coroutines and `set` run in the coordinator's event loop; `view` may be called from any thread.

    Args:
        coordinator: carries changes out.
        settings: at the start.
        max_ep_size: all ranks. replica_size: ranks of an attention replica, of which sizes are multiples.
        sample: returns what the active ranks do now, None where that is not known.
        clock: the clock of the meter's times.
        wait_s: seconds that a manual request waits for the end of a change that the policy started.
        on_step: given the view, without decisions, after every step.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        settings: PolicySettings,
        *,
        max_ep_size: int,
        replica_size: int = 1,
        sample: Callable[[], Sample | None],
        meter: RequestMeter,
        clock: Callable[[], float] = time.perf_counter,
        wait_s: float = 120.0,
        on_step: Callable[[PolicyView], None] = lambda _view: None,
    ) -> None:
        check_sizes(settings, max_ep_size)
        self._coordinator = coordinator
        self._settings = settings
        self._max = max_ep_size
        self._replica_size = replica_size
        self._sampler = sample
        self._meter = meter
        self._clock = clock
        self._wait_s = wait_s
        self._on_step = on_step
        self._estimator = Estimator(settings.objective)
        self._state = PolicyState()
        self._snapshot: Snapshot | None = None
        self._ttft = self._itl = Quantiles()
        self._decisions: deque[Decision] = deque(maxlen=DECISIONS_KEPT)
        self._totals: Counter[str] = Counter()
        self._followed: str | None = None  # the latest operation, until it has ended
        self._seen: str | None = None
        self._change_s = 0.0
        self._refused_until = 0.0
        self._failed = ""

    # -- settings and manual requests ---------------------------------------------------------------------------------

    def set(self, values: Mapping[str, Any]) -> PolicyView:
        """Replace some settings by name; returns the policy with them. Raises UserInputError, and changes nothing
        then."""
        settings = settings_changed(self._settings, values)
        check_sizes(settings, self._max)
        if settings != self._settings:
            logger.info("policy: %s", msgspec.json.encode(settings).decode())
        if settings.slo != self._settings.slo:
            self._estimator.slo = settings.objective or self._estimator.slo
            self._estimator.mark(self._clock())
        if settings.autoscale is not self._settings.autoscale:
            # Whoever turns it on wants it to act, also where a manual request has held it, or is about to.
            self._follow(self._clock())
            self._state = msgspec.structs.replace(self._state, trial=None, held_until=float("-inf"))
        self._settings = settings
        return self.view()

    async def submit(
        self, target: Target, operation_id: str | None = None, *, expected_epoch: int | None = None
    ) -> Operation:
        """A manual request: it wins over the policy, which holds afterwards.

        Raises:
            OperationInProgress: the policy's own change did not end in time. For others see `Coordinator.submit`.
        """
        self._hold()
        running = self._coordinator.running
        if running is not None and running.operation_id.startswith(OWN):
            try:
                await asyncio.wait_for(self._coordinator.wait(running.operation_id), self._wait_s)
            except asyncio.TimeoutError:
                raise OperationInProgress(
                    f"the policy's change to EP size {running.new_ep_size} did not end within {self._wait_s:g} s",
                    operation=running.operation_id,
                ) from None
        return await self._coordinator.submit(target, operation_id, expected_epoch=expected_epoch)

    def _hold(self) -> None:
        self._state = held(self._state, self._clock() + self._settings.hold_s)

    # -- the loop -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Decide once a second until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.step()
                self._on_step(self.view(0))
                self._failed = ""
            except Exception as error:
                # Nothing is held here, serving does not depend on it, and one bad second must not end it for good.
                if self._failed != (failed := f"{type(error).__name__}: {error}"):
                    logger.exception("the policy could not decide")
                self._failed = failed

    async def step(self) -> Decision | None:
        """Measure and decide once. Returns the decision; None while the policy is off."""
        now = self._clock()
        self._meter.drain(now, self._estimator)
        sample = self._sampler()
        if sample is not None:
            self._estimator.sampled(now, sample)
        self._follow(now)
        self._snapshot = snapshot = self._look(now)
        self._ttft, self._itl = self._estimator.latencies(now)
        if self._settings.autoscale is Autoscale.OFF:
            return None
        decision, state = decide(
            snapshot,
            self._settings,
            self._state,
            now,
            max_ep_size=self._max,
            replica_size=self._replica_size,
            busy=self._busy(now),
        )
        if self._settings.autoscale is Autoscale.SHADOW:
            self._state = msgspec.structs.replace(state, trial=None)
        elif decision.action is Action.NOTHING:
            self._state = state
        else:
            decision = await self._act(decision, state, now)
        return self._remember(decision)

    def _look(self, now: float) -> Snapshot | None:
        snapshot = self._estimator.snapshot(now, self._settings)
        if snapshot is None or not self._settings.forecast:
            return snapshot
        expected = self._estimator.demand.expected(now, self._settings.drain_s + self._change_s)
        if expected is None:
            return snapshot
        return msgspec.structs.replace(
            snapshot, expected_tokens_per_s=expected.tokens_per_s, expected_because=expected.because
        )

    def _busy(self, now: float) -> str | None:
        running = self._coordinator.running
        if running is not None:
            return f"a change to {running.new_ep_size} ranks is {running.phase.value}"
        if not self._coordinator.idle:
            return "ranks are recovering, or the HMM does not answer"
        if now < self._refused_until:
            return f"the last change was not possible; waiting for {self._refused_until - now:.0f} s"
        return None

    def _follow(self, now: float) -> None:
        """Notice changes that were asked for, by whom ever, and their ends."""
        latest = next(iter(self._coordinator.operations()), None)
        if latest is not None and latest.operation_id != self._seen:
            self._seen = self._followed = latest.operation_id
        operation = self._coordinator.get(self._followed) if self._followed is not None else None
        if operation is None or not operation.phase.ended:
            return
        self._followed = None
        own = operation.operation_id.startswith(OWN)
        if not own and operation.cause is Cause.TARGET and not operation.rebalances:
            self._hold()
        if operation.phase is Phase.DONE and operation.old_ep_size == operation.new_ep_size:
            return
        self._state = changed(self._state, now, self._settings)
        self._estimator.mark(now + self._settings.drain_s)
        self._change_s = (operation.timings.total_ms or 0.0) / 1e3
        if own and operation.phase is not Phase.DONE:
            self._refused_until = now + _REFUSED_WAIT_S

    async def _act(self, decision: Decision, state: PolicyState, now: float) -> Decision:
        try:
            operation = await self._coordinator.submit(
                ScaleTo(size=decision.desired), operation_id=f"{OWN}{uuid.uuid4().hex}"
            )
        except ElasticMoEError as error:
            if not isinstance(error, OperationInProgress):
                self._refused_until = now + _REFUSED_WAIT_S
            return msgspec.structs.replace(decision, because=f"{decision.because}; refused: {error}")
        # A manual request may have come while the coordinator looked at this one.
        self._state = msgspec.structs.replace(state, held_until=max(state.held_until, self._state.held_until))
        logger.info("policy: %s (operation %s)", decision.because, operation.operation_id)
        return msgspec.structs.replace(decision, acted=True)

    def _remember(self, decision: Decision) -> Decision:
        decision = msgspec.structs.replace(decision, at=time.time())
        self._decisions.append(decision)
        self._totals[decision.action.value] += 1
        return decision

    # -- what it shows ------------------------------------------------------------------------------------------------

    def view(self, limit: int = 20) -> PolicyView:
        """The policy now, with the latest `limit` decisions, newest first."""
        snapshot, settings, left = self._snapshot, self._settings, self._state.held_until - self._clock()
        # Copying is atomic in CPython, so that another thread may look while a decision is added.
        decisions = list(self._decisions)
        latest = decisions[-1] if decisions else None
        off = settings.autoscale is Autoscale.OFF
        state = "off" if off else latest.because if latest is not None else "nothing was decided yet"
        view = PolicyView(
            settings=settings,
            mode=settings.autoscale,
            state=f"the policy cannot decide: {self._failed}" if self._failed else state,
            max_ep_size=self._max,
            desired_ranks=None if off or latest is None else latest.desired,
            held_until=time.time() + left if left > 0 else None,
            decisions_total=dict(self._totals),
            decisions=list(itertools.islice(reversed(decisions), limit)),
            ttft=self._ttft,
            itl=self._itl,
        )
        return view if snapshot is None else _with_figures(view, snapshot, settings.objective is not None)


def _with_figures(view: PolicyView, snapshot: Snapshot, judged: bool) -> PolicyView:
    return msgspec.structs.replace(
        view,
        ranks=snapshot.ranks,
        attainment=snapshot.attainment if judged else None,
        goodput_tokens_per_s=snapshot.goodput_tokens_per_s if judged else 0.0,
        queue_length=snapshot.waiting,
        running=snapshot.running,
        arrivals_per_s=snapshot.arrivals_fast,
        tokens_per_s=snapshot.tokens_per_s,
        tokens_per_s_per_rank=snapshot.tokens_per_s / max(1, snapshot.ranks),
    )
