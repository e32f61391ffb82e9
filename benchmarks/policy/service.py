"""A server under load as a SIMULATION: requests wait for a slot, are prefilled by one rank, and decode in its batch.

Times come from the costs and the throughput model of `elasticmoe bench simulate`. All ranks together are one pool: the
router is taken to be fair.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from benchmarks.policy.traces import Request, Trace
from benchmarks.scaling.costs import Costs
from benchmarks.scaling.simulation import DecodeLoad, Weights, predict
from elasticmoe_sglang.policy.settings import Slo

TICK_S = 1.0
_PREFILL_SLOWS = 0.5
"""Of a rank's decoding, while it prefills: assumed."""


@dataclass(frozen=True)
class Machine:
    """What the simulated server runs on.

    Attributes:
        prefill_rate: prompt tokens a second of one rank.
    """

    costs: Costs
    weights: Weights
    load: DecodeLoad
    prefill_rate: float
    largest: int

    @cached_property
    def base_s(self) -> Mapping[int, float]:
        """ITL of a rank with an empty batch, by size."""
        fixed = self.load.layers * 2 * self.costs.far_latency_s.value
        memory = self.costs.memory_rate.value
        return {n: self.weights.per_device(n) / memory + fixed for n in range(1, self.largest + 1)}

    def slope_s(self, size: int) -> float:
        """ITL that each request in a rank's batch adds."""
        exchange = self.costs.near_copy.value if size <= self.costs.per_node else self.costs.far_copy.value
        read = self.load.context * self.load.kv_bytes / self.costs.memory_rate.value
        return read + self.load.layers * self.load.exchange_bytes / exchange

    def slots(self, size: int) -> int:
        """Requests that a rank has KV memory for; 0: the weights do not fit."""
        room = 0.9 * self.costs.hbm_bytes.value - self.weights.per_device(size)
        return max(0, min(self.load.max_batch, int(room // (self.load.kv_bytes * self.load.context))))

    def capacity(self, size: int, slo: Slo) -> float:
        """Output tokens a second of all ranks within the SLO."""
        batch = float(self.slots(size))
        if slo.itl_s is not None:
            batch = min(batch, (slo.itl_s - self.base_s[size]) / self.slope_s(size))
        return 0.0 if batch < 1 else size * batch / (self.base_s[size] + self.slope_s(size) * batch)

    def smallest(self) -> int:
        """The smallest size that the weights fit."""
        return next(size for size in range(1, self.largest + 1) if self.slots(size) >= 8)

    def change_s(self, old: int, new: int) -> float:
        """Seconds from the request of a change until it is effective."""
        key = (old, new)
        if key not in self._changes:
            self._changes[key] = predict(self.costs, self.weights, old, new, capture=False).scale_latency_s
        return self._changes[key]

    @cached_property
    def _changes(self) -> dict[tuple[int, int], float]:
        return {}


class Governor(Protocol):
    """Decides the size; told everything that the real policy measures."""

    def arrived(self, at: float, rid: str, prompt_tokens: int) -> None: ...
    def first_token(self, at: float, rid: str) -> None: ...
    def ended(self, at: float, rid: str, output_tokens: int) -> None: ...

    def tick(self, server: Server) -> int | None:
        """Called once a second; returns the size to change to."""

    def changed(self, server: Server) -> None:
        """A change has ended."""


class Scheduled:
    """Changes at given times: a fixed size, or an oracle's plan.

    Args:
        plan: (seconds, size) in order.
    """

    def __init__(self, plan: tuple[tuple[float, int], ...] = ()) -> None:
        self._plan = deque(plan)

    def arrived(self, at: float, rid: str, prompt_tokens: int) -> None: ...
    def first_token(self, at: float, rid: str) -> None: ...
    def ended(self, at: float, rid: str, output_tokens: int) -> None: ...
    def changed(self, server: Server) -> None: ...

    def tick(self, server: Server) -> int | None:
        if server.changing:
            return None
        wanted = None
        while self._plan and self._plan[0][0] <= server.now:
            wanted = self._plan.popleft()[1]
        return wanted


@dataclass
class Outcome:
    """What a run gave.

    Attributes:
        attained: requests that met the SLO, of `requests`.
        rank_seconds: held until the end of the trace, joining and retiring ranks included.
        sizes: (seconds, size) of every change that was made.
        produced: output tokens in each second.
    """

    requests: int = 0
    attained: int = 0
    rank_seconds: float = 0.0
    sizes: list[tuple[float, int]] = field(default_factory=list)
    produced: list[float] = field(default_factory=list)

    @property
    def attainment(self) -> float:
        return self.attained / self.requests if self.requests else 1.0


class Server:
    """One run. `run` may be called once.

    Attributes:
        now: simulated seconds. size: ranks that serve. changing: a change is going on.
        decoding, prefilling, waiting: requests. tokens: output tokens so far.
    """

    def __init__(self, machine: Machine, trace: Trace, slo: Slo, governor: Governor, size: int) -> None:
        self.machine, self.trace, self.slo, self.governor = machine, trace, slo, governor
        self.now = 0.0
        self.size = size
        self.changing = False
        self.prefilling = 0
        self.waiting: deque[tuple[int, Request]] = deque()
        self.tokens = 0.0
        self.outcome = Outcome(requests=len(trace.requests), sizes=[(0.0, size)])
        self._progress = 0.0  # tokens that each decoding request has got since the start, if it was there
        self._ends: list[tuple[float, int]] = []
        self._prefills: list[tuple[float, int]] = []
        self._first: dict[int, float] = {}
        self._commit: tuple[float, int] | None = None
        self._set_size(size)

    @property
    def decoding(self) -> int:
        return len(self._ends)

    @property
    def slots(self) -> int:
        """Requests that KV memory allows on all ranks."""
        return self._slots

    def _set_size(self, size: int) -> None:
        self.size = size
        self._base, self._slope = self.machine.base_s[size], self.machine.slope_s(size)
        self._slots = size * self.machine.slots(size)

    def _speed(self) -> float:
        """Tokens a second of each decoding request."""
        if not self._ends:
            return 0.0
        share = min(1.0, self.prefilling / self.size)
        return (1 - _PREFILL_SLOWS * share) / (self._base + self._slope * len(self._ends) / self.size)

    def _advance(self, moment: float, speed: float) -> None:
        gained = speed * (moment - self.now)
        self._progress += gained
        self.tokens += gained * len(self._ends)
        self.now = moment

    def run(self) -> Outcome:
        """Until the last request has ended."""
        requests, count, following, next_tick = self.trace.requests, len(self.trace.requests), 0, TICK_S
        while following < count or self._ends or self._prefills or self.waiting or self.now < self.trace.duration_s:
            speed = self._speed()
            arrival = requests[following].at if following < count else math.inf
            prefilled = self._prefills[0][0] if self._prefills else math.inf
            ended = self.now + max(0.0, self._ends[0][0] - self._progress) / speed if self._ends else math.inf
            commit = self._commit[0] if self._commit else math.inf
            moment = min(arrival, prefilled, ended, commit, next_tick)
            self._advance(moment, speed)
            if moment == ended:
                self._end()
            elif moment == arrival:
                self._arrive(following, requests[following])
                following += 1
            elif moment == prefilled:
                self._start_decoding()
            elif moment == commit:
                self._committed()
            else:
                self._tick()
                next_tick += TICK_S
        return self.outcome

    def _arrive(self, number: int, request: Request) -> None:
        self.governor.arrived(self.now, str(number), request.prompt_tokens)
        self.waiting.append((number, request))
        self._admit()

    def _admit(self) -> None:
        while self.waiting and self.prefilling < self.size and self.prefilling + self.decoding < self._slots:
            number, request = self.waiting.popleft()
            self.prefilling += 1
            took = request.prompt_tokens / self.machine.prefill_rate + self._base
            heapq.heappush(self._prefills, (self.now + took, number))

    def _start_decoding(self) -> None:
        _, number = heapq.heappop(self._prefills)
        self.prefilling -= 1
        self._first[number] = self.now
        self.tokens += 1
        self.governor.first_token(self.now, str(number))
        further = self.trace.requests[number].output_tokens - 1
        heapq.heappush(self._ends, (self._progress + further, number))
        self._admit()

    def _end(self) -> None:
        _, number = heapq.heappop(self._ends)
        request, first = self.trace.requests[number], self._first.pop(number)
        self.governor.ended(self.now, str(number), request.output_tokens)
        slo, further = self.slo, request.output_tokens - 1
        prompt = slo.ttft_s is None or first - request.at <= slo.ttft_s
        paced = slo.itl_s is None or self.now - first <= further * slo.itl_s * (1 + 1e-9)
        self.outcome.attained += prompt and paced
        self._admit()

    def _tick(self) -> None:
        held = self.size if self._commit is None else max(self.size, self._commit[1])
        if self.now <= self.trace.duration_s:
            self.outcome.rank_seconds += held * TICK_S
        self.outcome.produced.append(self.tokens)
        wanted = self.governor.tick(self)
        if wanted is not None and wanted != self.size and not self.changing:
            self.changing = True
            self._commit = (self.now + self.machine.change_s(self.size, wanted), wanted)

    def _committed(self) -> None:
        assert self._commit is not None
        self._set_size(self._commit[1])
        self._commit, self.changing = None, False
        self.outcome.sizes.append((self.now, self.size))
        self.governor.changed(self)
        self._admit()
