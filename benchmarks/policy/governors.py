"""Who decides the size in the simulation: the real policy, and an oracle that knows the trace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from benchmarks.policy.service import Machine, Outcome, Scheduled, Server
from benchmarks.policy.traces import Trace
from elasticmoe_sglang.policy.decision import Action, Decision, PolicyState, changed, decide
from elasticmoe_sglang.policy.estimator import Estimator, Sample
from elasticmoe_sglang.policy.settings import PolicySettings, Slo

_BIN_S = 10
_ROUNDS = 9


class Policy:
    """The project's own estimator, forecast and decision, driven as the controller drives them.

    Attributes:
        decisions: all that were made.
    """

    def __init__(self, settings: PolicySettings, largest: int) -> None:
        self._settings, self._largest = settings, largest
        self._estimator = Estimator(settings.objective)
        self._state = PolicyState()
        self._tokens = 0.0
        self._change_s = 0.0
        self._asked_at = 0.0
        self.decisions: list[Decision] = []
        self.arrived = self._estimator.arrived
        self.first_token = self._estimator.first_token
        self.ended = self._estimator.ended

    def tick(self, server: Server) -> int | None:
        now, estimator = server.now, self._estimator
        tokens, self._tokens = server.tokens - self._tokens, server.tokens
        estimator.produced(now, round(tokens))
        estimator.sampled(now, self._sample(server))
        snapshot = estimator.snapshot(now, self._settings)
        if snapshot is not None and self._settings.forecast:
            expected = estimator.demand.expected(now, self._settings.drain_s + self._change_s)
            if expected is not None:
                snapshot = msgspec.structs.replace(
                    snapshot, expected_tokens_per_s=expected.tokens_per_s, expected_because=expected.because
                )
        busy = "a change runs" if server.changing else None
        decision, self._state = decide(snapshot, self._settings, self._state, now, max_ep_size=self._largest, busy=busy)
        self.decisions.append(decision)
        if decision.action is Action.NOTHING:
            return None
        self._asked_at = now
        return decision.desired

    @staticmethod
    def _sample(server: Server) -> Sample:
        running = server.decoding + server.prefilling
        return Sample(
            ranks=server.size,
            running=running,
            waiting=len(server.waiting),
            kv_use=min(1.0, running / server.slots),
            slots=server.machine.load.max_batch,
        )

    def changed(self, server: Server) -> None:
        self._state = changed(self._state, server.now, self._settings)
        self._estimator.mark(server.now + self._settings.drain_s)
        self._change_s = server.now - self._asked_at


@dataclass(frozen=True)
class Planned:
    """An oracle's plan and what it gave."""

    use: float
    outcome: Outcome


def best_plan(
    machine: Machine, trace: Trace, slo: Slo, smallest: int, produced: list[float], attainment: float
) -> Planned | None:
    """The cheapest plan, of those that use the capacity of every size alike, that attains as much as asked for.

    It knows the trace: every change starts early enough to be effective when the load comes, and its size is the
    smallest whose true capacity, times a share that is searched for, holds the load. None: no share attains as much.

    Args:
        produced: output tokens until each second, of the largest size.
    """
    low, high = 0.4, 1.3
    best: Planned | None = None
    for _ in range(_ROUNDS):
        use = (low + high) / 2
        plan = _plan(machine, slo, smallest, produced, use)
        outcome = Server(machine, trace, slo, Scheduled(plan[1:]), plan[0][1]).run()
        if outcome.attainment >= attainment:
            low = use
            if best is None or outcome.rank_seconds < best.outcome.rank_seconds:
                best = Planned(use, outcome)
        else:
            high = use
    return best


def _plan(
    machine: Machine, slo: Slo, smallest: int, produced: list[float], use: float
) -> tuple[tuple[float, int], ...]:
    capacities = {size: machine.capacity(size, slo) for size in range(smallest, machine.largest + 1)}
    sizes = []
    for start in range(0, len(produced), _BIN_S):
        end = min(start + _BIN_S, len(produced)) - 1
        before = produced[start - 1] if start else 0.0
        load = (produced[end] - before) / (end + 1 - start)
        fitting = (size for size, capacity in capacities.items() if capacity * use >= load)
        sizes.append(next(fitting, machine.largest))
    plan = [(-math.inf, sizes[0])]
    for number, size in enumerate(sizes[1:], 1):
        last = plan[-1][1]
        if size != last:
            lead = math.ceil(machine.change_s(last, size)) if size > last else 0.0
            plan.append((number * _BIN_S - lead, size))
    return tuple(plan)
