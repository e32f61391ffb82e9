"""A server in one thread and in virtual time: workers, IMM, HMM, commit barrier, requests, and faults by seed.

The engine is the real one. What it asks for is done here by small models of the parts, with random delays, reorderings,
failures and deaths at any moment, and every rule that a server must keep is asserted where it could break:

- a view is committed at most once for each epoch, and the holders of columns and copies have mapped them;
- each row of each column is computed by exactly one rank;
- the HMM frees nothing that a living worker maps, and a column's memory is never lost;
- a request runs on one worker at a time, and each is answered exactly once;
- in the end nothing is left over, and the ranks of the last target serve.

A run is its seed: the same seed gives the same run.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.coordinator import steps as s
from elasticmoe_sglang.coordinator.engine import Engine
from elasticmoe_sglang.coordinator.proposal import Deadlines, commit_id
from elasticmoe_sglang.coordinator.status import CommitReport, MemoryStatus, Moved, Phase, PullReport, Withdrawal
from elasticmoe_sglang.errors import (
    CommitError,
    ElasticMoEError,
    HmmUnavailable,
    PlanError,
    TransactionError,
    WorkerError,
)
from elasticmoe_sglang.planner import (
    TURNS,
    Cause,
    Rebalance,
    RetireRanks,
    ScaleTo,
    Target,
    TransitionPlan,
    View,
    initial_placement,
    plan_target,
)
from elasticmoe_sglang.planner.placement import turns_of
from elasticmoe_sglang.wire.to_worker import JoinSpec

DEADLINES = Deadlines(prepare=20.0, commit=2.0, finish=5.0, recover=60.0, collective=3.0)
TICK_S = 0.05
FAULTS_UNTIL_S = 6.0
SETTLED_BY_S = 240.0

Part = Generator[float, None, Any]


class Broken(AssertionError):
    """A rule was broken."""


@dataclass(eq=False)
class Process:
    """A worker. `view`: None until it is a member. `mapped`: column -> block. `at`: the proposals at whose barrier it
    stands. `counted`: since it was asked to give up requests."""

    pid: int
    rank: int
    alive: bool = True
    stopped: bool = False
    view: View | None = None
    mapped: dict[int, int] = field(default_factory=dict)
    broken: bool = False
    booted: bool = False
    retiring: bool = False
    sent: bool = False
    counted: bool = False
    at: set[tuple[int, int]] = field(default_factory=set)
    requests: set[int] = field(default_factory=set)


@dataclass(eq=False)
class Proposal:
    """One try at the commit barrier."""

    plan: TransitionPlan
    attempt: int
    expires: float
    arrived: set[int] = field(default_factory=set)
    decision: bool | None = None
    reports: dict[int, bool] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, int]:
        return self.plan.after.epoch, self.attempt


class World:
    """Args:
    seed: of everything that is random.
    capacity, columns: of the server; it starts with all but one rank.
    replica_size: ranks of an attention replica; requests are on the rank that leads it.
    faults: how many of them.
    redundant: the most copies of columns; then columns are rebalanced often.
    """

    def __init__(
        self,
        seed: int,
        *,
        capacity: int = 4,
        columns: int = 7,
        faults: int = 3,
        redundant: int = 0,
        replica_size: int = 1,
    ) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.now = 0.0
        self._sequence = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self.trace: list[str] = []
        self.replica_size = replica_size
        size = max(1, self.random.randint(2, capacity) // replica_size) * replica_size
        ranks = tuple(range(size))
        membership = Membership(ranks=ranks, epoch=0, capacity=capacity)
        self.view = View(membership=membership, placement=initial_placement(columns, ranks))
        self.capacity, self.columns = capacity, columns
        self._pid = 100
        self._unheard = 0  # deaths that are on their way to the engine
        self.blocks: dict[int, tuple[int, int]] = {}  # block -> (rank, column)
        self._last_block = 0
        self.processes: list[Process] = []
        for rank in ranks:
            process = self._spawn(rank)
            process.view, process.booted = self.view, True
            for column in self.view.placement.columns_of(rank):
                process.mapped[column] = self._allocate(rank, column)
        self.hmm_alive = True
        self.hmm_instance = 1
        self.txns: dict[str, set[int]] = {}
        self.proposals: dict[tuple[int, int], Proposal] = {}
        self.routed = set(ranks)
        self.standbys = 1
        self.remaining: dict[int, int] = {}
        self.done: set[int] = set()
        self._in_transit: dict[int, int] = {}
        self.committed_epochs: dict[int, View] = {0: self.view}
        self.running: dict[int, tuple[Part, s.Step]] = {}
        self.phases: dict[str, Phase] = {}
        self.goal: tuple[int, ...] = ranks
        self.ended: str | None = None
        self._wake = 0
        pids = {p.rank: p.pid for p in self.processes}
        self.engine = Engine(self.view, pids, DEADLINES, restore=True, replica_size=replica_size)
        self.faults = faults
        self.overlapping = 0
        self.redundant = redundant
        self.copies_served = 0
        self._checked: tuple[tuple[int, View | None], ...] = ()

    # -- time ---------------------------------------------------------------------------------------------------

    def later(self, delay: float, call: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._queue, (self.now + delay, self._sequence, call))

    def soon(self, most: float = 0.02) -> float:
        return self.random.uniform(0.0005, most)

    def note(self, what: str) -> None:
        self.trace.append(f"{self.now:8.3f} {what}")

    def run(self) -> None:
        """Raises Broken, with the seed and the end of the trace."""
        self._plan_events()
        self.post(s.StandbysReady(count=self.standbys))
        self.later(TICK_S, self._tick)
        try:
            while self._queue:
                self.now, _, call = heapq.heappop(self._queue)
                if self.now > SETTLED_BY_S:
                    raise Broken(f"not settled: {self._unsettled()}")
                call()
                if self.ended is not None:
                    raise Broken(f"the server ended: {self.ended}")
                if self.now > FAULTS_UNTIL_S and self._unsettled() is None:
                    self._check_end()
                    return
        except (AssertionError, PlanError) as error:
            tail = "\n".join(self.trace[-60:])
            raise Broken(f"seed {self.seed}: {error}\n{tail}") from error

    def _plan_events(self) -> None:
        for _ in range(self.random.randint(1, 3) if not self.redundant else self.random.randint(2, 6)):
            self.later(self.random.uniform(0.0, FAULTS_UNTIL_S), self._ask_for_target)
        for number in range(8):
            self.later(self.random.uniform(0.0, FAULTS_UNTIL_S), lambda number=number: self._arrive(number))  # type: ignore[misc]
        first = self.random.uniform(0.2, FAULTS_UNTIL_S)
        for _ in range(self.faults):
            near = self.random.random() < 0.6  # overlapping, often
            at = (
                min(FAULTS_UNTIL_S, first + self.random.expovariate(8.0))
                if near
                else self.random.uniform(0, FAULTS_UNTIL_S)
            )
            self.later(at, self._fault)

    # -- the engine ---------------------------------------------------------------------------------------------

    def post(self, event: s.Event) -> None:
        for effect in self.engine.handle(event, self.now):
            self._carry_out(effect)

    def _carry_out(self, effect: s.Effect) -> None:
        match effect:
            case s.Start(number=number, step=step):
                self.note(f"start {number} {s.describe(step)}")
                self.running[number] = (self._step(step), step)
                self.later(self.soon(0.005), lambda: self._go_on(number))
            case s.Cancel(number=number):
                if number in self.running:
                    part, _ = self.running.pop(number)
                    part.close()
                    self.later(self.soon(), lambda: self.post(s.StepEnded(number=number, cancelled=True)))
            case s.Advanced(operation_id=name, phase=phase, error=error):
                self.note(f"{name}: {phase.value} {error or ''}")
                self.phases[name] = phase
            case s.Opened(operation_id=name, plan=plan):
                self.note(
                    f"{name}: {plan.before.ranks} -> {plan.after.ranks}, lost {plan.lost}, epoch {plan.after.epoch}"
                )
            case s.EndServer(reason=reason):
                self.ended = reason
            case s.WakeAt(time=at):
                self._wake += 1
                if at is not None:
                    wake = self._wake
                    self.later(max(0.0, at - self.now), lambda: self._woken(wake))

    def _woken(self, wake: int) -> None:
        if wake == self._wake:
            self.post(s.Tick())

    def _go_on(self, number: int) -> None:
        if number not in self.running:
            return
        part, step = self.running[number]
        try:
            delay = next(part)
        except StopIteration as end:
            del self.running[number]
            if self.now < FAULTS_UNTIL_S and self.random.random() < 0.01:  # it happened, the answer was lost
                if isinstance(step, s.Begin):
                    self.txns.pop(end.value)  # as the port promises
                self.post(s.StepEnded(number=number, error=WorkerError("injected after")))
            else:
                self.post(s.StepEnded(number=number, result=end.value))
        except ElasticMoEError as error:
            del self.running[number]
            self.note(f"step {number} {s.describe(step)}: {error.what}")
            self.post(s.StepEnded(number=number, error=error))
        else:
            self.later(delay, lambda: self._go_on(number))

    # -- targets, requests, faults ------------------------------------------------------------------------------

    def _ask_for_target(self) -> None:
        target: Target = ScaleTo(size=self.random.randint(1, self.capacity))
        if self.random.random() < 0.3 and len(self.engine.view.ranks) > 1:
            target = RetireRanks(ranks=self._replica_of(self.random.choice(self.engine.view.ranks[1:])))
        elif self.random.random() < (0.6 if self.redundant else 0.25):
            target = self._rebalance()
        name = f"target-{len(self.phases)}-{self.now:.3f}"
        busy = any(not phase.ended and key.startswith("target") for key, phase in self.phases.items())
        if busy or not self.hmm_alive:
            return
        try:
            plan = plan_target(self.engine.view, target, replica_size=self.replica_size)
        except PlanError:
            return
        self.phases[name] = Phase.PLANNED
        self.post(s.Wanted(operation_id=name, target=target, plan=plan))

    def _rebalance(self) -> Rebalance:
        load = [self.random.randint(0, 9) for _ in self.engine.view.owners]
        if not self.redundant:
            return Rebalance(load=tuple(load))
        # One column gets more than a rank's share: without copies nobody can divide it.
        load[self.random.randrange(len(load))] *= 10
        return Rebalance(load=tuple(load), redundant=self.random.choice((0, 1, self.redundant)))

    def _replica_of(self, rank: int) -> tuple[int, ...]:
        first = rank // self.replica_size * self.replica_size
        return tuple(range(first, first + self.replica_size))

    def _leading(self, ranks: Iterable[int]) -> list[int]:
        return [rank for rank in sorted(ranks) if rank % self.replica_size == 0]

    def _arrive(self, number: int) -> None:
        self.remaining[number] = self.random.randint(3, 40)
        self._route(number)

    def _route(self, number: int, among: set[int] | None = None) -> None:
        """SGLang's controller: to a routed rank; a rank without a worker keeps it until a recovery drops it."""
        rank = self.random.choice(self._leading(among or self.routed))
        process = self.of(rank)
        self.note(f"request {number} is routed to rank {rank}")
        if process is not None and not process.retiring:
            process.requests.add(number)

    def of(self, rank: int) -> Process | None:
        return next((p for p in reversed(self.processes) if p.rank == rank and p.alive), None)

    def _spawn(self, rank: int) -> Process:
        self._pid += 1
        process = Process(self._pid, rank)
        self.processes.append(process)
        return process

    def die(self, process: Process) -> None:
        if not process.alive:
            return
        process.alive = False
        self.note(f"rank {process.rank} pid {process.pid} dies")
        process.requests.clear()
        self._unheard += 1

        def heard() -> None:
            self._unheard -= 1
            self.post(s.WorkerGone(rank=process.rank, pid=process.pid))

        self.later(self.soon(0.05), heard)
        if self.standbys < 1:
            self.later(self.random.uniform(0.5, 2.0), self._refill)

    def _not_now(self, process: Process, act: Callable[[], None]) -> bool:
        """A dead process does nothing, a stopped one later."""
        if process.alive and process.stopped:
            self.later(0.05, act)
        return not process.alive or process.stopped

    def _stop(self, process: Process) -> None:
        self.note(f"rank {process.rank} pid {process.pid} stops")
        process.stopped = True

        for_ever = self.random.random() < 0.3

        def go_on() -> None:
            # With no other rank that runs it is missed by nobody: SGLang's own watchdog ends it, after minutes.
            if for_ever and any(p is not process and not p.stopped for p in self.members()):
                self.later(5.0, go_on)
            else:
                process.stopped = False

        self.later(self.random.choice((0.1, 1.0, 5.0)), go_on)

    def _refill(self) -> None:
        self.standbys = max(self.standbys, 1)
        self.post(s.StandbysReady(count=self.standbys))

    def _fault(self) -> None:
        if self.engine.running is not None or self.engine.recovering:
            self.overlapping += 1
        kind = self.random.choice(("worker", "worker", "worker", "worker", "hmm", "stop"))
        living = [p for p in self.processes if p.alive]
        if kind == "hmm" and self.hmm_alive:
            self._lose_hmm()
        elif kind == "stop":
            members = [p for p in living if p.view is not None and not p.retiring]
            if members:
                self._stop(self.random.choice(members))
        elif living:
            self.die(self.random.choice(living))

    def _lose_hmm(self) -> None:
        self.note("the HMM dies")
        self.hmm_alive = False
        self.txns.clear()
        self.later(self.soon(0.15), lambda: self.post(s.MemoryHeld(reason=HmmUnavailable("the HMM has ended"))))
        self.later(self.random.uniform(0.3, 1.5), self._adopt)

    def _adopt(self) -> None:
        """Another HMM takes over when nobody is in the middle of a change that is not a recovery."""
        running = self.engine.running
        if running is not None and running.cause is not Cause.LOSS:
            self.later(0.05, self._adopt)
            return
        self.hmm_alive, self.hmm_instance = True, self.hmm_instance + 1
        for process in self.processes:
            if process.alive:
                self.blocks |= {block: (process.rank, column) for column, block in process.mapped.items()}
        self.note("another HMM serves")
        self.post(s.MemoryHeld(reason=None))

    # -- serving ------------------------------------------------------------------------------------------------

    def members(self) -> list[Process]:
        return [p for p in self.processes if p.alive and p.view is not None and not p.retiring]

    def _tick(self) -> None:
        """A batch on every member, or, when one is missing, the collective that fails on all others."""
        self.later(TICK_S, self._tick)
        serving = [p for p in self.members() if not p.broken and not p.at]
        missing = [
            rank
            for rank in self.view.ranks
            if not any(p.rank == rank and not p.stopped and not p.broken for p in self.members())
        ]
        if any(self._waits(p) for p in self.members()):
            return
        if missing:
            stopped = [p for p in self.members() if p.stopped]
            delay = DEADLINES.collective if stopped and len(stopped) == len(missing) else 0.02
            for process in serving:
                if not process.stopped and process.view is not None and process.view.epoch == self.view.epoch:
                    process.broken = True
                    self.later(delay + self.soon(), lambda p=process, c=missing[0]: self._report_broken(p, c))  # type: ignore[misc]
            return
        if len({p.view.epoch for p in serving if p.view}) > 1:
            raise Broken("two views serve at the same time")
        self._check_turns(serving)
        for process in serving:
            assert process.view is not None
            short = set(process.view.placement.columns_of(process.rank)) - process.mapped.keys()
            if short:
                raise Broken(f"rank {process.rank} serves without columns {sorted(short)}")
            for number in sorted(process.requests):
                self._token(process, number)

    def _check_turns(self, serving: list[Process]) -> None:
        """By the tables of those who serve, each by its own view, every column is computed once in each turn."""
        views = tuple((p.rank, p.view) for p in serving)
        if views == self._checked or {rank for rank, _ in views} != set(self.view.ranks):
            return  # no batch without all of them
        self._checked = views
        computed: Counter[tuple[int, int]] = Counter()
        for rank, view in views:
            assert view is not None
            shared = view.placement.shared_by(rank)
            for column in view.placement.columns_of(rank):
                computed.update((column, turn) for turn in turns_of(column, *shared.get(column, (0, 1))))
        once = {(column, turn) for column in range(self.columns) for turn in range(TURNS)}
        wrong = sorted(pair for pair in once | computed.keys() if computed[pair] != 1)
        if wrong:
            column, turn = wrong[0]
            raise Broken(f"column {column} is computed {computed[wrong[0]]} times in turn {turn}")
        self.copies_served += len(self.view.placement.copies)

    def _waits(self, process: Process) -> bool:
        """It stands at a commit barrier that is not decided yet."""
        return any(self.proposals[key].decision is None for key in process.at)

    def _report_broken(self, process: Process, culprit: int) -> None:
        if self._not_now(process, lambda: self._report_broken(process, culprit)):
            return
        if process.alive and process.broken and process.view is not None:
            self.post(s.RankBroken(rank=process.rank, epoch=process.view.epoch, culprit=culprit))

    def _token(self, process: Process, number: int) -> None:
        others = [p for p in self.members() if p is not process and number in p.requests]
        if others or number in self._in_transit:
            raise Broken(f"request {number} runs on ranks {[process.rank, *(p.rank for p in others)]} at once")
        if number in self.done:
            raise Broken(f"request {number} goes on after its end")
        self.remaining[number] -= 1
        if self.remaining[number] == 0:
            self.done.add(number)
            process.requests.discard(number)

    # -- the commit barrier -------------------------------------------------------------------------------------

    def _arrive_at(self, process: Process, proposal: Proposal) -> None:
        if self._not_now(process, lambda: self._arrive_at(process, proposal)):
            return
        if process.view and process.view.epoch >= proposal.plan.after.epoch:
            return
        if proposal.decision is False:
            self._obey(process, proposal)
            return
        process.at.add(proposal.key)
        proposal.arrived.add(process.rank)
        self._look_at(proposal)

    def _look_at(self, proposal: Proposal) -> None:
        """What leader and followers do: every few milliseconds until there is a decision."""
        if proposal.decision is not None:
            return
        leader = self.of(0)
        participants = set(proposal.plan.participants)
        if leader is None or not leader.alive:
            if proposal.arrived:
                self.decide(proposal, False)
        elif 0 in proposal.arrived and not leader.stopped:
            present = {rank for rank in proposal.arrived if (p := self.of(rank)) and proposal.key in p.at}
            gone = [rank for rank in participants - present if self.of(rank) is None]
            if self.now >= proposal.expires or gone:
                self.decide(proposal, False)
            elif present == participants:
                self.decide(proposal, True)
        elif self.now >= proposal.expires + 2.0 and proposal.arrived:
            self.decide(proposal, False)
        if proposal.decision is None and self.now < proposal.expires + 10:
            self.later(0.01, lambda: self._look_at(proposal))

    def decide(self, proposal: Proposal, commit: bool) -> None:
        if proposal.decision is not None:
            return
        proposal.decision = commit
        epoch = proposal.plan.after.epoch
        self.note(f"epoch {epoch} attempt {proposal.attempt}: {'COMMIT' if commit else 'ABORT'}")
        if commit:
            if epoch in self.committed_epochs:
                raise Broken(f"epoch {epoch} was committed twice")
            if epoch != self.view.epoch + 1:
                raise Broken(f"epoch {epoch} follows epoch {self.view.epoch}")
            self.view = self.committed_epochs[epoch] = proposal.plan.after
        for rank in sorted(proposal.arrived):
            process = self.of(rank)
            if process is not None and proposal.key in process.at:
                self._obey(process, proposal)

    def _obey(self, process: Process, proposal: Proposal) -> None:
        if self._not_now(process, lambda: self._obey(process, proposal)):
            return
        process.at.discard(proposal.key)
        plan = proposal.plan
        if proposal.decision:
            process.broken = False
            if process.rank in plan.after.ranks:
                process.view = plan.after
                short = set(plan.after.placement.columns_of(process.rank)) - process.mapped.keys()
                if short:
                    raise Broken(f"rank {process.rank} committed without columns {sorted(short)}")
            else:
                process.retiring = True
                self.later(self.random.uniform(0.01, 0.3), lambda: self._retire(process, plan))
        elif process.view is None:
            self.later(self.soon(), lambda: self.die(process))  # the change for which it was started was given up
        elif plan.cause is not Cause.LOSS and self.of(0) is None:
            process.broken = True
            self.later(self.soon(), lambda: self._report_broken(process, 0))
        decision = bool(proposal.decision)
        if process.alive:
            self.later(self.soon(0.05), lambda: proposal.reports.setdefault(process.rank, decision))

    # -- retiring -----------------------------------------------------------------------------------------------

    def _retire(self, process: Process, plan: TransitionPlan) -> None:
        """Send the requests away: they are in transit until survivors resume them."""
        if self._not_now(process, lambda: self._retire(process, plan)):
            return
        for number in process.requests:
            self._in_transit[number] = process.pid
        process.requests.clear()
        process.sent = True
        self.later(self.soon(0.1), lambda: self.die(process))

    # -- steps --------------------------------------------------------------------------------------------------

    def _need_hmm(self) -> None:
        if not self.hmm_alive:
            raise HmmUnavailable("no HMM answers")

    def _need(self, rank: int) -> Process:
        process = self.of(rank)
        if process is None:
            raise WorkerError("it has exited", rank=rank)
        return process

    def _step(self, step: s.Step) -> Part:
        yield self.soon()
        if self.now < FAULTS_UNTIL_S and self.random.random() < 0.01:
            raise WorkerError("injected before")
        match step:
            case s.AwaitMemory():
                until = self.now + 20
                while not self.hmm_alive:
                    if self.now > until:
                        raise HmmUnavailable("no HMM has adopted the memory")
                    yield 0.05
            case s.CheckRoom() | s.Pauses():
                return {}
            case s.ReadMemory():
                self._need_hmm()
                return MemoryStatus(available=True)
            case s.Begin(operation_id=name):
                self._need_hmm()
                txn = f"{name}/{self.now:.4f}"
                self.txns[txn] = set()
                return txn
            case s.DropKv() | s.GrowKv():
                self._need_hmm()
            case s.ShrinkKv(plan=plan):
                self._need_hmm()
                for rank in plan.survivors:
                    self._need(rank)
                return dict.fromkeys(plan.joining, 1)
            case s.Boot(join_spec=spec):
                return (yield from self._boot(spec))
            case s.Pull(rank=rank, txn=txn, moves=moves):
                columns = [move.column for move in moves]
                yield from self._take(self._need(rank), columns, txn)
                return PullReport(columns=len(moves), bytes=0)
            case s.Drop(rank=rank, moves=moves):
                process = self.of(rank)
                if process is not None:
                    for move in moves:
                        process.mapped.pop(move.column, None)
            case s.Commit():
                return (yield from self._commit(step))
            case s.Withdraw(plan=plan, attempt=attempt):
                return self._withdraw(plan, attempt)
            case s.Route(ranks=ranks):
                self.routed = set(ranks)
            case s.Migrate(rank=rank):
                return (yield from self._migrate(rank))
            case s.SpreadWaiting():
                return (yield from self._spread_waiting(step))
            case s.Resend():
                return (yield from self._resend(step))
            case s.CommitMemory(txn=txn):
                self._need_hmm()
                if self.txns.pop(txn, None) is None:
                    raise TransactionError("it ended with its HMM")
            case s.RollBackMemory(txn=txn):
                self._roll_back(txn)
            case s.Dismiss(rank=rank):
                yield from self._dismiss(rank)
            case s.Release(rank=rank, columns=released):
                self._release(rank, released)
            case s.Tidy():
                self._need_hmm()
                self._tidy()
            case s.Kill(rank=rank, pid=pid):
                process = self.of(rank)
                if process is not None and process.pid == pid:
                    self.die(process)
        return None

    def _boot(self, spec: JoinSpec) -> Part:
        if self.of(spec.rank) is not None:
            raise WorkerError("the IMM refused: the rank is taken", rank=spec.rank)
        wait = 0.0 if self.standbys else self.random.uniform(0.5, 3.0)
        self.standbys = max(0, self.standbys - 1)
        self.post(s.StandbysReady(count=self.standbys))
        self.later(self.random.uniform(0.5, 2.0), self._refill)
        process = self._spawn(spec.rank)
        self.later(self.soon(), lambda: self.post(s.WorkerUp(rank=process.rank, pid=process.pid)))
        yield wait + self.random.uniform(0.05, 0.6)
        if not process.alive:
            raise WorkerError("it exited while it booted", rank=spec.rank)
        yield from self._take(process, spec.held, spec.txn)
        process.booted = True
        if spec.attempt:
            self.later(self.soon(), lambda: self._arrive_when_proposed(process, spec.epoch, spec.attempt))
        return PullReport(columns=len(spec.held), bytes=0)

    def _arrive_when_proposed(self, process: Process, epoch: int, attempt: int) -> None:
        proposal = self.proposals.get((epoch, attempt))
        if proposal is not None:
            self._arrive_at(process, proposal)
        elif process.alive:
            self.later(0.02, lambda: self._arrive_when_proposed(process, epoch, attempt))

    def _take(self, process: Process, columns: list[int], txn: str) -> Part:
        for column in columns:
            yield self.soon(0.01)
            self._need_hmm()
            if not process.alive:
                raise WorkerError("it exited while it pulled", rank=process.rank)
            if column in process.mapped:
                raise WorkerError(f"column {column} is mapped already", rank=process.rank)
            known = {block: rank for block, (rank, held) in self.blocks.items() if held == column}
            if not known:
                raise Broken(f"column {column} is nowhere any more")
            unsettled = {block for name, blocks in self.txns.items() if name != txn for block in blocks}
            usable = known.keys() - unsettled or known.keys()
            here = [block for block in usable if known[block] == process.rank]
            if not here:
                if txn not in self.txns:
                    raise TransactionError("the transaction has ended")
                here = [self._allocate(process.rank, column)]
                self.txns[txn].add(here[0])
            process.mapped[column] = here[0]

    def _allocate(self, rank: int, column: int) -> int:
        self._last_block += 1
        self.blocks[self._last_block] = rank, column
        return self._last_block

    def _commit(self, step: s.Commit) -> Part:
        plan = step.plan
        proposal = self.proposals.setdefault(
            (plan.after.epoch, step.attempt), Proposal(plan, step.attempt, step.expires)
        )
        if plan.cause is Cause.LOSS:
            for rank in plan.survivors:
                process = self._need(rank)
                self.later(self.soon(0.05), lambda p=process: self._recover_at(p, proposal))  # type: ignore[misc]
            self.routed = set(plan.after.ranks)
            voters = plan.participants
        else:
            self.routed = set(plan.survivors)
            self.later(self.soon(0.05), lambda: self._broadcast(proposal))
            voters = plan.before.ranks
        while len(proposal.reports.keys() & set(voters)) < len(voters):
            yield 0.01
            gone = [rank for rank in voters if self.of(rank) is None and rank not in proposal.reports]
            if gone:
                yield self.soon(0.05)
                raise WorkerError("it has exited", rank=gone[0])
        committed = all(proposal.reports[rank] for rank in voters)
        if committed != bool(proposal.decision):
            raise Broken("reports and decision disagree")
        return CommitReport(committed=committed, reason=None if committed else "the commit barrier decided to abort")

    def _recover_at(self, process: Process, proposal: Proposal) -> None:
        """A survivor takes the command once its collective has failed."""
        if self._not_now(process, lambda: self._recover_at(process, proposal)) or self.now > proposal.expires + 5:
            return
        if process.view is not None and process.view.epoch >= proposal.plan.after.epoch:
            return
        if process.broken and not process.at:
            self._arrive_at(process, proposal)
        else:
            self.later(0.01, lambda: self._recover_at(process, proposal))

    def _broadcast(self, proposal: Proposal) -> None:
        """SGLang's control broadcast: all ranks in the same iteration, or none."""
        before = proposal.plan.before.ranks
        ranks = [self.of(rank) for rank in before]
        if self.view.epoch != proposal.plan.before.epoch or any(p is None or p.broken or p.stopped for p in ranks):
            return
        for process in [*ranks, *(self.of(rank) for rank in proposal.plan.joining)]:
            if process is not None:
                late = 0.02 if self.random.random() < 0.95 else 2.5
                process.at.add(proposal.key)
                self.later(self.soon(late), lambda p=process: self._arrive_at(p, proposal))  # type: ignore[misc]

    def _withdraw(self, plan: TransitionPlan, attempt: int) -> Withdrawal:
        if self.random.random() < 0.1:
            raise CommitError("another rank kept the commit barrier's lock")
        key = plan.after.epoch, attempt
        proposal = self.proposals.setdefault(key, Proposal(plan, attempt, self.now))
        self.decide(proposal, False)
        absent = [rank for rank in plan.participants if self.of(rank) and rank not in proposal.reports]
        return Withdrawal(committed=bool(proposal.decision), absent=tuple(absent))

    def _migrate(self, rank: int) -> Part:
        pid = max(p.pid for p in self.processes if p.rank == rank)
        process = next(p for p in self.processes if p.pid == pid)
        while not process.sent:
            if not process.alive:
                yield self.soon(0.05)
                raise WorkerError("it died while it retired", rank=rank)
            yield 0.01
        yield self.soon(0.05)
        moved = [number for number, source in self._in_transit.items() if source == pid]
        receivers = [p for p in self.members() if p.rank in self._leading(self.view.ranks)]
        for number in moved:
            del self._in_transit[number]
            if receivers:
                self.random.choice(receivers).requests.add(number)
        return Moved(requests=len(moved))

    def _spread_waiting(self, step: s.SpreadWaiting) -> Part:
        """What ranks give up is on no rank until the tokenizer has their answers, and lost when that never comes."""
        answers: dict[int, set[int]] = {}
        epoch = self.view.epoch

        def give_up(process: Process) -> None:
            if self._not_now(process, lambda: give_up(process)):
                return
            if process.view is None or process.view.epoch != epoch or process.counted:
                return  # requests have been counted since
            given = {number for number in process.requests if self.random.random() < 0.5}
            process.requests -= given
            self.note(f"rank {process.rank} gives up requests {sorted(given)}")
            answers[process.rank] = given

        asked = [process for rank in step.ranks if (process := self.of(rank)) is not None]
        for process in asked:
            process.counted = False
            self.later(self.soon(0.05), lambda p=process: give_up(p))  # type: ignore[misc]
        while any(process.alive and process.rank not in answers for process in asked):
            yield 0.01
        yield self.soon(0.05)
        if self.now < FAULTS_UNTIL_S and self.random.random() < 0.1:
            raise WorkerError("injected on the way")
        given = sorted(number for answer in answers.values() for number in answer)
        for number in given:
            self._route(number, set(step.joining) & self.routed)
        return len(given)

    def _resend(self, step: s.Resend) -> Part:
        members = [self._need(rank) for rank in self.view.ranks]
        yield self.soon(0.05)
        if step.operation_id and step.operation_id != commit_id_of(self.proposals, self.view):
            raise Broken("a recovery's requests are counted in another epoch")
        for process in members:
            process.counted = True
            if not process.alive or process.broken:
                raise WorkerError("it does not answer", rank=process.rank)
        forgotten = {p.pid for p in self.processes if p.rank in step.forget and not p.alive}
        self._in_transit = {n: source for n, source in self._in_transit.items() if source not in forgotten}
        # What has arrived and waits for the rest of its rank's requests is on a rank.
        here = {number for process in members for number in process.requests} | set(self._in_transit)
        strayed = [n for n in self.remaining if n not in self.done and n not in here]
        leading = [process for process in members if process.rank in self._leading(self.view.ranks)]
        for number in strayed:
            self.random.choice(leading).requests.add(number)
        return len(strayed)

    def _roll_back(self, txn: str) -> None:
        if not self.hmm_alive or txn not in self.txns:
            return  # it ended with its HMM
        freed = self.txns.pop(txn)
        mapped = {block for p in self.processes if p.alive for block in p.mapped.values()}
        if freed & mapped:
            raise Broken(f"the HMM frees {[self.blocks[block] for block in freed & mapped]}, which workers map")
        for block in freed:
            self.blocks.pop(block, None)

    def _dismiss(self, rank: int) -> Part:
        process = self.of(rank)
        if process is None:
            return
        if process.view is not None and not process.retiring:
            raise Broken(f"a serving worker of rank {rank} is dismissed")
        if not process.retiring:
            self.die(process)
        while process.alive:
            yield 0.01
        yield self.soon(0.05)

    def _release(self, rank: int, columns: tuple[int, ...]) -> None:
        process = self.of(rank)
        if rank in self.view.ranks:
            if process is not None:
                for column in columns:
                    process.mapped.pop(column, None)
        elif process is not None and process.retiring:
            raise Broken(f"memory of rank {rank} is released while its worker lives")
        self._need_hmm()
        released = {(rank, column) for column in columns}
        self.blocks = {block: place for block, place in self.blocks.items() if place not in released}

    def _tidy(self) -> None:
        placed = {(holder, column) for column, holder in self.view.placement.held()}
        mapped = {(p.rank, column) for p in self.processes if p.alive for column in p.mapped}
        self.blocks = {block: place for block, place in self.blocks.items() if place in placed or place in mapped}

    # -- the end ------------------------------------------------------------------------------------------------

    def _unsettled(self) -> str | None:
        if not self.engine.idle or self.running:
            return f"the engine is not idle: {[s.describe(step) for _, step in self.running.values()]}"
        if self._unheard:  # a death of the last instant: the engine cannot have acted on it
            return f"{self._unheard} deaths are not reported"
        if self.engine.missing():
            return f"ranks {self.engine.missing()} are not restored"
        open_ = sorted(number for number in self.remaining if number not in self.done)
        if open_ or len(self.remaining) < 8:
            return f"requests {open_} are not answered"
        return None

    def _check_end(self) -> None:
        assert self.engine.view == self.view, "the engine knows another view"
        members = {p.rank: p for p in self.members()}
        replicas = {rank // self.replica_size for rank in members}
        assert len(members) == len(replicas) * self.replica_size, f"replicas are not whole: {sorted(members)}"
        assert set(members) == set(self.view.ranks), "workers that are no members are left"
        for rank, process in members.items():
            assert process.view == self.view
            assert process.mapped.keys() == set(self.view.placement.columns_of(rank)), (
                f"rank {rank} maps {[*process.mapped]}"
            )
        others = [p.rank for p in self.processes if p.alive and p not in members.values()]
        assert not others, f"workers of ranks {others} are left over"
        assert not self.txns, "a transaction is open"
        assert all(phase.ended for phase in self.phases.values()), f"operations are open: {self.phases}"
        placed = {(holder, column) for column, holder in self.view.placement.held()}
        assert placed <= set(self.blocks.values()), "the ledger lacks columns"
        assert not self._in_transit


def commit_id_of(proposals: dict[tuple[int, int], Proposal], view: View) -> str:
    """The name of the proposal that committed a view."""
    return next(
        commit_id(p.plan, p.attempt) for p in proposals.values() if p.decision and p.plan.after.epoch == view.epoch
    )
