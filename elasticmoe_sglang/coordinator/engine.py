"""The engine: every change of the view, whatever its cause, as one state machine. Pure: events in, effects out.

It has no clock (the time comes with each event), no I/O and no randomness, so a run is its events, and a fault is a
seed (tests/helpers/engine_world.py). `driver.py` carries the effects out.

Targets, losses and restores are transitions from the latest committed view to another one, along one way:

    prepare    transaction, KV, boots, pulls       undone in reverse when a step fails, time is up or a rank is lost
    commit     one proposal at the commit barrier  who gives up withdraws it first; only then is the outcome known
    finish     requests, memory                    each step once, a failure of one does not stop another

A loss ends a transition that is preparing and starts another one from the latest view. What is lost is not remembered
but compared: a rank is lost when the process that serves it in the view is not the one that lives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from elasticmoe_sglang.comm.commit_barrier import Attempts
from elasticmoe_sglang.coordinator import steps as s
from elasticmoe_sglang.coordinator.program import All, Failed, Program, Runner, Until, text_of
from elasticmoe_sglang.coordinator.proposal import Deadlines, commit_id
from elasticmoe_sglang.coordinator.status import CommitReport, Phase, PullReport, Withdrawal
from elasticmoe_sglang.errors import ElasticMoEError, TransactionError, WorkerError
from elasticmoe_sglang.planner import Cause, TransitionPlan, View, plan_loss, plan_restore, plan_target, whole_replicas
from elasticmoe_sglang.wire.to_worker import JoinSpec

logger = logging.getLogger(__name__)

COMMIT_ANSWER_S = 1.0
"""The commit barrier decides within the commit deadline; the workers' reports may arrive this much later."""
STALLED_S = 0.3
"""A worker that others have missed in a collective, and that has not missed anybody itself so much later, is killed."""
_SILENT_S = 1.0
_WITHDRAW_AGAIN_S = 0.1
_BACKOFF_S, _MOST_BACKOFF_S = 0.1, 2.0
_RESTORE_BACKOFF_S, _MOST_RESTORE_BACKOFF_S = 1.0, 60.0
_MEETINGS, _MEETINGS_S = 3, 60.0

_CLOSING = "the server is shutting down"
_OWED = (s.Drop, s.Dismiss, s.Release, s.CommitMemory, s.RollBackMemory)
"""Steps that are done again, later, when they have failed."""


@dataclass
class _Transition:
    """The transition that runs.

    Attributes:
        undo: what undoes the steps of workers, which run together, and then those of memory, in reverse.
        booted, retiring: pid of the worker that booted for a joining rank, or served a retiring one.
    absent: participants that had the commit's whole time and did not come to the commit barrier.
    """

    operation_id: str
    plan: TransitionPlan
    attempt: int
    phase: Phase = Phase.PLANNED
    undo_workers: list[s.Step] = field(default_factory=list)
    undo_memory: list[s.Step] = field(default_factory=list)
    txn: str = ""
    booted: dict[int, int | None] = field(default_factory=dict)
    absent: tuple[int, ...] = ()
    retiring: dict[int, int | None] = field(default_factory=dict)


class Engine:
    """Args:
    view: the committed view. workers: rank -> pid of the worker that serves it.
    restore: bring lost ranks back as soon as a standby worker is ready.
    replica_size: ranks of an attention replica, which join, retire and are lost together.
    """

    def __init__(
        self, view: View, workers: dict[int, int], deadlines: Deadlines, *, restore: bool, replica_size: int = 1
    ) -> None:
        self.view = view
        self._deadlines = deadlines
        self._restore = restore
        self._replica_size = replica_size
        self._serving: dict[int, int | None] = {rank: workers.get(rank) for rank in view.ranks}
        self._alive: dict[int, int] = dict(workers)
        self._goal = view.ranks  # the ranks of the last target
        self._broken: dict[int, int] = {}
        self._broken_since = 0.0
        self._broken_ahead: list[s.RankBroken] = []  # in a view that has been committed, which is not known here yet
        self._meetings: dict[int, float] = {}
        self._standbys = 0
        self._memory: ElasticMoEError | None = None
        self._closing = False
        self._wanted: s.Wanted | None = None
        self._unsent = False
        self._lingering: dict[int, int | None] = {}
        self._strays: set[int] = set()  # ranks that ended while they retired, until their requests have been sent again
        self._debts: list[s.Step] = []
        self._restore_at = 0.0
        self._restore_backoff = _RESTORE_BACKOFF_S
        self._names = 0
        self._attempts = Attempts()
        self._running: _Transition | None = None
        self._absent: tuple[int, ...] = ()
        self._ended = False
        self._now = 0.0
        self._effects: list[s.Effect] = []
        self._runner = Runner(self._run(), self._effects.append)

    # -- what others may ask ------------------------------------------------------------------------------------

    @property
    def running(self) -> TransitionPlan | None:
        """The plan of the transition that runs."""
        return self._running.plan if self._running is not None else None

    @property
    def idle(self) -> bool:
        """Nothing runs, nothing is lost, and the memory is whole."""
        free = self._running is None and self._wanted is None and self._memory is None
        owed = self.lost() or self._broken or self._unsent or self._debts
        return free and not self._closing and not owed

    @property
    def at_rest(self) -> bool:
        """Idle, the last target serves, and a standby worker is ready."""
        return self.idle and not self.missing() and self._standbys > 0

    @property
    def target_ranks(self) -> tuple[int, ...]:
        """The ranks of the last target, ascending; those that were lost since are restored."""
        return self._goal

    @property
    def recovering(self) -> bool:
        """A rank is lost, or collectives have failed, and no later view serves yet."""
        loss = self._running is not None and self._running.plan.cause is Cause.LOSS
        return loss or bool(self.lost()) or bool(self._broken)

    def lost(self) -> tuple[int, ...]:
        """Active ranks whose worker has ended."""
        return tuple(rank for rank in self.view.ranks if self._alive.get(rank) != self._serving[rank])

    def missing(self) -> tuple[int, ...]:
        """Ranks of the last target that are not active."""
        return tuple(rank for rank in self._goal if rank not in self.view.ranks)

    # -- events -------------------------------------------------------------------------------------------------

    def handle(self, event: s.Event, now: float) -> list[s.Effect]:
        """Take an event at a time, in seconds of a clock that never goes back; returns what is to be done."""
        assert now >= self._now
        self._now = now
        match event:
            case s.StepEnded():
                self._runner.step_ended(event)
            case s.Wanted():
                assert self._wanted is None, "one target at a time"
                self._wanted = event
            case s.WorkerUp(rank=rank, pid=pid):
                self._alive[rank] = pid
            case s.WorkerGone(rank=rank, pid=pid):
                if self._alive.get(rank) == pid:
                    del self._alive[rank]
                    self._broken.pop(rank, None)
                    self._broken_ahead = [each for each in self._broken_ahead if each.rank != rank]
            case s.RankBroken():
                self._hear_broken(event)
            case s.StandbysReady(count=count):
                self._standbys = count
            case s.MemoryHeld(reason=reason):
                self._memory = reason
                if reason is not None:
                    self._drop_wanted(f"{reason.what}. {reason.hint}")
            case s.Closing():
                self._closing = True
                self._drop_wanted(_CLOSING)
            case s.Tick():
                pass
        self._runner.advance(now, self.operation_id)
        effects = [*self._effects, s.WakeAt(time=self._runner.wake_at())]
        self._effects.clear()
        return effects

    def _drop_wanted(self, why: str) -> None:
        """A target that waits for a recovery is not reached; one that runs ends by itself."""
        if self._wanted is not None and self.operation_id() != self._wanted.operation_id:
            name, self._wanted = self._wanted.operation_id, None
            self._effects.append(s.Advanced(operation_id=name, phase=Phase.ROLLED_BACK, error=why))

    def operation_id(self) -> str:
        """Of the transition that runs; empty when none does."""
        return self._running.operation_id if self._running is not None else ""

    # -- the program --------------------------------------------------------------------------------------------

    def _run(self) -> Program[None]:
        while not self._ended:
            yield Until(self._work, self._next_time())
            if self.lost() or self._broken:
                yield from self._recover()
            elif self._unsent:
                yield from self._send_unsent()
            elif self._wanted is not None:
                yield from self._reach_target(self._wanted)
            elif self._debts and self._memory is None:
                yield from self._settle_debts()
            elif self._restorable():
                yield from self._bring_back()

    def _work(self) -> bool:
        owed = self._unsent or (self._debts and self._memory is None)
        return bool(self.lost() or self._broken or owed or self._wanted or self._restorable())

    def _next_time(self) -> float | None:
        return self._restore_at if self._restore and self.missing() and self._now < self._restore_at else None

    def _restorable(self) -> bool:
        due = self._restore and not self._closing and self._memory is None and self._now >= self._restore_at
        return due and self._standbys > 0 and bool(self.missing())

    def _no_memory(self) -> str | None:
        """Why a transition that prepares cannot go on: its transaction ended with the HMM, and another one is only
        started when nothing needs this one any more."""
        return self._memory.what if self._memory is not None else None

    def _loss(self) -> str | None:
        """Why a transition that prepares cannot go on."""
        lost = self.lost()
        if lost:
            return f"rank {', '.join(map(str, lost))} was lost meanwhile"
        return "a collective failed meanwhile" if self._broken else None

    # Targets and restores

    def _reach_target(self, wanted: s.Wanted) -> Program[None]:
        name = wanted.operation_id
        try:
            plan = plan_target(self.view, wanted.target, replica_size=self._replica_size)
        except ElasticMoEError as error:  # the view has changed since it was asked for
            self._wanted = None
            self._effects.append(s.Advanced(operation_id=name, phase=Phase.ROLLED_BACK, error=str(error)))
            return
        if plan.is_noop:
            self._wanted, self._goal = None, plan.after.ranks
            self._effects += [s.Opened(operation_id=name, plan=plan), s.Advanced(operation_id=name, phase=Phase.DONE)]
            return

        def interrupted() -> str | None:
            return _CLOSING if self._closing else self._no_memory() or self._loss()

        check = plan != wanted.plan
        committed, _ = yield from self._change(name, plan, self._deadlines.prepare, interrupted, check_room=check)
        self._wanted = None
        if committed:
            self._goal = plan.after.ranks
            self._restore_backoff, self._restore_at = _RESTORE_BACKOFF_S, self._now

    def _bring_back(self) -> Program[None]:
        ready = max(1, self._standbys // self._replica_size) * self._replica_size  # whole replicas
        plan = plan_restore(self.view, self.missing()[:ready])

        def interrupted() -> str | None:
            if self._closing:
                return _CLOSING
            return "another target was set" if self._wanted is not None else self._no_memory() or self._loss()

        name = self._name("restore")
        committed, _ = yield from self._change(name, plan, self._deadlines.prepare, interrupted, check_room=True)
        if committed:
            self._restore_backoff = _RESTORE_BACKOFF_S
        elif self._wanted is None:
            self._restore_at = self._now + self._restore_backoff
            self._restore_backoff = min(2 * self._restore_backoff, _MOST_RESTORE_BACKOFF_S)

    def _name(self, cause: str) -> str:
        self._names += 1
        return f"{cause}-{self._names}"

    # Losses

    def _recover(self) -> Program[None]:
        """Go on without the lost ranks, or with standby workers for them; in as many attempts as it takes in time."""
        name = self._name("loss")
        tried: tuple[int, ...] | None = None
        deadline, backoff, failures = 0.0, _BACKOFF_S, 0
        while self.lost() or self._broken:
            if not self.lost() and not (yield from self._everybody_waits()):
                continue
            if self.lost() and not (yield from self._end_mates()):
                return
            lost = self.lost()
            if lost != tried:
                tried, failures, deadline = lost, 0, self._now + self._deadlines.recover
            plan = plan_loss(self.view, lost, replace_all=failures % 2 == 1, replica_size=self._replica_size)
            committed, error = yield from self._change(name, plan, deadline - self._now, self._overtaken(lost))
            if committed:
                name, tried = self._name("loss"), None
                continue
            yield from self._kill_absent(plan)
            failures += 1
            logger.error("attempt %d to recover without ranks %s failed: %s", failures, list(lost), error)
            again = min(self._now + backoff, deadline)
            yield Until(self._differs_from(lost), again)
            backoff = min(2 * backoff, _MOST_BACKOFF_S)
            if self._now >= deadline and self.lost() == lost:
                self._end(f"ranks {list(lost)} were lost and could not be replaced: {error}")
                return

    def _mates(self) -> list[int]:
        """Ranks that live and have a part of the KV of a replica of which another rank is lost."""
        return sorted(set(whole_replicas(self.view.ranks, self.lost(), self._replica_size)) - set(self.lost()))

    def _end_mates(self) -> Program[bool]:
        """Most end by themselves. False when one did not end in time, and the server does."""
        deadline = self._now + self._deadlines.finish
        while (mates := self._mates()) and self._now < deadline:
            yield from self._kill(mates, stalled=False)
            yield Until(lambda: not self._mates(), min(self._now + _SILENT_S, deadline))
        if mates:
            self._end(f"ranks {mates} share a replica with lost ranks {list(self.lost())} and could not be ended")
        return not mates

    def _kill_absent(self, plan: TransitionPlan) -> Program[None]:
        """Survivors that did not come to the commit barrier in all its time have stalled."""
        yield from self._kill([rank for rank in self._absent if rank in plan.survivors])

    def _kill(self, ranks: Sequence[int], *, stalled: bool = True) -> Program[None]:
        kills = [s.Kill(rank=rank, pid=pid, stalled=stalled) for rank in ranks if (pid := self._serving[rank])]
        if kills:
            yield All(kills, "ending ranks that cannot go on", self._now + self._deadlines.finish, each=True)

    def _overtaken(self, lost: tuple[int, ...]) -> Callable[[], str | None]:
        return lambda: None if self.lost() == lost else "another rank was lost too"

    def _differs_from(self, lost: tuple[int, ...]) -> Callable[[], bool]:
        return lambda: self.lost() != lost

    def _everybody_waits(self) -> Program[bool]:
        """Collectives have failed, and nobody is known to be lost: kill who is missed and silent. Returns True when all
        ranks wait, so that they only have to meet again."""
        yield Until(lambda: bool(self.lost()), self._broken_since + STALLED_S)
        if self.lost() or not self._broken:
            return bool(self.lost())
        silent = [rank for rank in self.view.ranks if rank not in self._broken]
        if not silent:
            since = self._now - _MEETINGS_S
            # Once for each epoch: a recovery that fails for another reason finds them broken as before.
            self._meetings = {e: at for e, at in self._meetings.items() if at > since} | {self.view.epoch: self._now}
            if len(self._meetings) > _MEETINGS:
                self._end("collectives of living ranks fail again and again; the ranks do not do the same")
            return True
        missed = [rank for rank in silent if rank in self._broken.values()]
        late = self._now >= self._broken_since + self._deadlines.collective + _SILENT_S
        if missed or late:
            yield from self._kill(missed or silent)
        count, later = len(self._broken), self._now + _SILENT_S
        yield Until(lambda: bool(self.lost()) or len(self._broken) != count, later)
        return False

    def _send_unsent(self) -> Program[None]:
        """Requests may be on no rank: send them again until that has succeeded."""
        backoff = _BACKOFF_S
        while self._unsent and not self.lost() and not self._broken:
            resend = s.Resend(operation_id="", forget=tuple(sorted(self._strays)))
            try:
                if not (yield from self._end_lingering()):
                    continue
                yield All(
                    [resend], "sending requests again", self._now + self._deadlines.finish, interrupted=self._loss
                )
                self._unsent = False
                self._strays.clear()
            except Failed as error:
                logger.error("requests could not be sent again: %s", text_of(error))
                yield Until(lambda: bool(self.lost() or self._broken), self._now + backoff)
                backoff = min(2 * backoff, _MOST_BACKOFF_S)

    def _end_lingering(self) -> Program[bool]:
        """A retiring rank whose requests are sent again may only be late: it must not answer them any more."""
        deadline = self._now + self._deadlines.finish
        for rank, pid in list(self._lingering.items()):
            while self._alive.get(rank) == pid is not None and self._now < deadline:
                yield All([s.Kill(rank=rank, pid=pid)], "ending a late rank", deadline, each=True)
                yield Until(self._is_gone(rank, pid), min(self._now + _SILENT_S, deadline))
            if self._alive.get(rank) != pid:
                del self._lingering[rank]
        return not self._lingering

    def _is_gone(self, rank: int, pid: int) -> Callable[[], bool]:
        return lambda: self._alive.get(rank) != pid

    def _settle_debts(self) -> Program[None]:
        """Steps of earlier transitions that have failed: again, until they succeed or something else has to be done."""
        backoff = _BACKOFF_S
        while self._debts:
            try:
                yield from self._pay_debts(self._now + self._deadlines.finish)
                yield All([s.GrowKv()], "growing KV", self._now + self._deadlines.finish, each=True)
            except Failed as error:
                logger.error("%s is still to be done: %s", s.describe(self._debts[0]), text_of(error))
                yield Until(self._pressing, self._now + backoff)
                backoff = min(2 * backoff, _MOST_BACKOFF_S)
                if self._pressing():
                    return

    def _pressing(self) -> bool:
        return bool(self.lost() or self._broken or self._wanted or self._memory is not None)

    def _pay_debts(self, deadline: float) -> Program[None]:
        """In order, because memory must not be freed before it is unmapped. Raises what the first failure raises."""
        while self._debts:
            step = self._still_owed(self._debts[0])
            if step is not None:
                try:
                    yield All([step], "cleaning up", deadline)
                except Failed as error:
                    if not isinstance(error.cause, TransactionError):
                        raise
                    logger.info("%s: %s", s.describe(step), error)  # it has ended with its HMM
            del self._debts[0]

    def _still_owed(self, step: s.Step) -> s.Step | None:
        """What of a step that has failed is to be done in the present view: a recovery does not wait for it, and may
        have put another worker into the rank, or the columns back."""
        held = self.view.placement.held()
        match step:
            case s.Dismiss(rank=rank) if rank in self.view.ranks and rank not in self.lost():
                return None
            case s.Release(rank=rank, columns=columns):
                kept = {column for column, holder in held if holder == rank}
                left = tuple(column for column in columns if column not in kept)
                return s.Release(rank=rank, columns=left) if left else None
            case s.Drop(rank=rank) if rank in self.lost():
                return None  # what it mapped has ended with it
            case s.Drop(rank=rank, txn=txn, moves=moves):
                kept = {column for column, holder in held if holder == rank}
                unheld = tuple(move for move in moves if move.column not in kept)
                return s.Drop(rank=rank, txn=txn, moves=unheld) if unheld else None
            case _:
                return step

    def _end(self, reason: str) -> None:
        self._ended = True
        self._effects.append(s.EndServer(reason=reason))

    # One transition

    def _change(
        self,
        operation_id: str,
        plan: TransitionPlan,
        prepare_s: float,
        interrupted: Callable[[], str | None],
        *,
        check_room: bool = False,
    ) -> Program[tuple[bool, str | None]]:
        """Returns whether the plan was committed, and what failed."""
        attempt = self._attempts.next(plan.after.epoch)
        change = self._running = _Transition(operation_id, plan, attempt)
        self._effects.append(s.Opened(operation_id=operation_id, plan=plan))
        try:
            self._enter(change, Phase.PREPARING)
            try:
                yield from self._prepare(change, self._now + prepare_s, interrupted, check_room)
            except Failed as error:
                logger.warning("operation %s: prepare failed: %s", operation_id, text_of(error))
                return False, (yield from self._undo(change, text_of(error)))
            self._enter(change, Phase.COMMITTING)
            reason = yield from self._commit(change)
            if reason is not None:
                return False, (yield from self._undo(change, reason))
            self._adopt(change)
            self._enter(change, Phase.FINISHING)
            problems = yield from self._finish(change)
            if problems:
                held = f"epoch {plan.after.epoch} serves, but cleaning up after the change failed"
                self._enter(change, Phase.FAILED, f"{held}: {s.joined(problems)}")
            else:
                self._enter(change, Phase.DONE)
            return True, None
        finally:
            self._running, self._absent = None, change.absent

    def _enter(self, change: _Transition, phase: Phase, error: str | None = None) -> None:
        change.phase = phase
        self._effects.append(s.Advanced(operation_id=change.operation_id, phase=phase, error=error))

    def _prepare(
        self, change: _Transition, deadline: float, interrupted: Callable[[], str | None], check_room: bool
    ) -> Program[None]:
        plan, lost = change.plan, change.plan.lost

        def run(steps: Sequence[s.Step]) -> Program[list[Any]]:
            results: list[Any] = yield All(steps, "preparing", deadline, interrupted=interrupted)
            return results

        if plan.cause is Cause.LOSS:
            yield from run([s.AwaitMemory()])
        try:
            yield from self._pay_debts(deadline)
        except Failed as error:
            if plan.cause is not Cause.LOSS:  # after a loss streams wait; what is owed may not stand in the way
                raise
            logger.error("%s is still to be done: %s", s.describe(self._debts[0]), text_of(error))
        if check_room:
            yield from run([s.CheckRoom(plan=plan)])
        yield from run([s.ReadMemory(after=False)])
        change.txn = (yield from run([s.Begin(operation_id=change.operation_id)]))[0]
        change.undo_memory += [s.GrowKv(), s.RollBackMemory(txn=change.txn)]
        if lost:
            yield from run([s.DropKv(ranks=lost)])
        chunks = (yield from run([s.ShrinkKv(plan=plan)]))[0]
        boots = [self._boot(change, rank, chunks.get(rank, 0)) for rank in plan.joining]
        pulls = [
            s.Pull(rank=rank, txn=change.txn, moves=moves) for rank in plan.survivors if (moves := plan.incoming(rank))
        ]
        # Before they start, because a step that failed half-way is undone too.
        change.undo_workers += [s.Dismiss(rank=rank) for rank in plan.joining]
        change.undo_workers += [s.Drop(rank=pull.rank, txn=change.txn, moves=pull.moves) for pull in pulls]
        pulling: list[s.Boot | s.Pull] = [*boots, *pulls]
        for step, report in zip(pulling, (yield from run(pulling)), strict=True):
            self._check_report(change, step, report)
        change.booted = {rank: self._alive.get(rank) for rank in plan.joining}

    def _boot(self, change: _Transition, rank: int, kv_chunks: int) -> s.Boot:
        plan = change.plan
        return s.Boot(
            join_spec=JoinSpec(
                rank=rank,
                members=plan.after.ranks,
                epoch=plan.after.epoch,
                joining_rank=True,
                placement=plan.after.owners,
                copies=plan.after.placement.copies,
                # A rank that takes a lost one's place comes to the commit barrier by itself: it may be the leader.
                attempt=change.attempt if plan.lost else 0,
                kv_chunks=kv_chunks,
                txn=change.txn,
                operation_id=_commit_id(change) if plan.lost else change.operation_id,
            )
        )

    def _check_report(self, change: _Transition, step: s.Boot | s.Pull, report: PullReport) -> None:
        rank = step.join_spec.rank if isinstance(step, s.Boot) else step.rank
        wanted = len(step.join_spec.held if isinstance(step, s.Boot) else step.moves)
        if report.columns != wanted:
            short = WorkerError(
                f"only {report.columns} of {wanted} columns were pulled", rank=rank, operation=change.operation_id
            )
            raise Failed(str(short), short)

    def _commit(self, change: _Transition) -> Program[str | None]:
        """Returns None after COMMIT, else why not."""
        plan, attempt = change.plan, change.attempt
        expires = self._now + self._deadlines.commit
        commit = s.Commit(plan=plan, operation_id=change.operation_id, attempt=attempt, expires=expires)
        try:
            report: CommitReport = (yield All([commit], "committing", expires + COMMIT_ANSWER_S))[0]
            return None if report.committed else report.reason or "the commit barrier did not commit"
        except Failed as error:
            why = text_of(error)
        # Who gives up decides: until the proposal is withdrawn, or known to be committed, nothing else may happen.
        logger.warning("operation %s: no report of the commit: %s", change.operation_id, why)
        while True:
            withdraw = s.Withdraw(plan=plan, attempt=attempt)
            try:
                end: Withdrawal = (yield All([withdraw], "withdrawing", self._now + self._deadlines.finish))[0]
            except Failed as error:
                logger.error("operation %s: could not withdraw: %s", change.operation_id, text_of(error))
                yield Until(lambda: False, self._now + _WITHDRAW_AGAIN_S)
                continue
            if self._now >= expires:
                change.absent = end.absent
            return None if end.committed else why

    def _adopt(self, change: _Transition) -> None:
        plan = change.plan
        self.view = plan.after
        change.retiring = {rank: self._serving[rank] for rank in plan.retiring}
        serving = {rank: self._serving.get(rank) for rank in plan.survivors}
        self._serving = serving | {rank: change.booted[rank] for rank in plan.joining}
        self._broken.clear()
        ahead, self._broken_ahead = self._broken_ahead, []
        for broken in ahead:
            self._hear_broken(broken)

    def _hear_broken(self, event: s.RankBroken) -> None:
        if event.epoch > self.view.epoch:
            self._broken_ahead.append(event)
        elif event.epoch == self.view.epoch and event.rank in self.view.ranks:
            self._broken_since = self._broken_since if self._broken else self._now
            self._broken[event.rank] = event.culprit

    def _finish(self, change: _Transition) -> Program[list[str]]:
        """Returns a sentence for each step that failed."""
        plan = change.plan
        first: list[s.Step] = [s.CommitMemory(txn=change.txn)]
        if plan.cause is Cause.LOSS:
            # Who could not be ended before may still hold requests: then they are sent again after it has ended.
            if (yield from self._end_lingering()):
                first.append(s.Resend(operation_id=_commit_id(change)))
            else:
                self._unsent = True
        else:
            first.append(s.Route(ranks=plan.after.ranks))
            leading = (rank for rank in plan.retiring if rank % self._replica_size == 0)
            first += [s.Migrate(rank=rank, operation_id=_commit_id(change)) for rank in leading]
        problems, _ = yield from self._each_once(change, first)
        release = [
            s.Release(rank=rank, columns=columns) for rank in plan.survivors if (columns := plan.departing(rank))
        ]
        dismiss = [s.Dismiss(rank=rank) for rank in plan.retiring]
        pauses = s.Pauses(ranks=plan.survivors)
        spread = []
        if plan.joining and plan.cause is not Cause.LOSS:  # a recovery has dealt all requests anew
            spread.append(s.SpreadWaiting(ranks=plan.survivors, joining=plan.joining))
        more, failed = yield from self._each_once(change, [*release, *dismiss, pauses, *spread])
        problems += more
        # The worker of a retiring rank that did not exit may still map its columns: they stay in the ledger, and the
        # operation's error names the rank.
        kept = {step.rank for step in failed if isinstance(step, s.Dismiss)}
        ended = [rank for rank in (*plan.retiring, *plan.lost) if rank not in kept and rank not in plan.after.ranks]
        gone = [s.Release(rank=rank, columns=plan.departing(rank)) for rank in ended]
        problems += (yield from self._each(change, gone))[0]
        last = (s.GrowKv(), *((s.Tidy(),) if plan.lost else ()), s.ReadMemory(after=True))
        for step in last:
            if not self.lost():  # else the next transition does it
                problems += (yield from self._each(change, [step]))[0]
        return problems

    def _each_once(self, change: _Transition, steps: Sequence[s.Step]) -> Program[tuple[list[str], list[s.Step]]]:
        """As `_each`; what a rank could not hand over is no problem once it was sent again."""
        problems, failed = yield from self._each(change, steps)
        strayed = [step for step in failed if isinstance(step, s.Migrate | s.SpreadWaiting | s.Resend)]
        if strayed:
            problems = [problem for problem, step in zip(problems, failed, strict=True) if step not in strayed]
            problems += yield from self._resend_strayed(change, strayed)
        return problems, failed

    def _resend_strayed(self, change: _Transition, strayed: Sequence[s.Step]) -> Program[list[str]]:
        """Requests of a retiring rank that died, of a lost one, or on their way to a joining one may be on no rank."""
        for step in strayed:
            if isinstance(step, s.Migrate):
                self._lingering[step.rank] = change.retiring[step.rank]
                self._strays.add(step.rank)
        if not (yield from self._end_lingering()):  # all of them, before any request is sent again
            self._unsent = True
            return [f"could not end the workers of ranks {sorted(self._lingering)}"]
        resend = s.Resend(operation_id="", forget=tuple(sorted(self._strays)))
        problems, failed = yield from self._each(change, [resend])
        if failed:
            self._unsent = True
        else:
            self._strays.clear()
        return problems

    def _undo(self, change: _Transition, reason: str) -> Program[str]:
        problems: list[str] = []
        if change.phase is Phase.COMMITTING and change.plan.cause is not Cause.LOSS:
            problems += (yield from self._each(change, [s.Route(ranks=change.plan.before.ranks)]))[0]
        more, failed = yield from self._each(change, change.undo_workers)
        problems += more
        for step in reversed(change.undo_memory):
            if not failed:
                more, failed = yield from self._each(change, [step])
                problems += more
            elif isinstance(step, _OWED):  # the HMM must not free what a worker still maps
                self._debts.append(step)
        if problems:
            held = f"{reason}; epoch {change.plan.before.epoch} still serves, but the rollback was incomplete"
            reason = f"{held}: {s.joined(problems)}"
        self._enter(change, Phase.FAILED if problems else Phase.ROLLED_BACK, reason)
        return reason

    def _each(self, change: _Transition, steps: Sequence[s.Step]) -> Program[tuple[list[str], list[s.Step]]]:
        """Run all steps, each within the finish deadline. Returns a sentence for each that failed, and those steps.

        What must not be left undone is done again later (`_debts`).
        """
        if not steps:
            return [], []
        outcomes = yield All(steps, "finishing", self._now + self._deadlines.finish, each=True)
        failed = [
            (step, outcome) for step, outcome in zip(steps, outcomes, strict=True) if isinstance(outcome, Exception)
        ]
        self._debts += [step for step, _ in failed if isinstance(step, _OWED)]
        for step, error in failed:
            logger.error("operation %s: could not %s: %s", change.operation_id, s.describe(step), text_of(error))
        return [f"could not {s.describe(step)}: {text_of(error)}" for step, error in failed], [
            step for step, _ in failed
        ]


def _commit_id(change: _Transition) -> str:
    """Names the proposal, in messages and fences."""
    return commit_id(change.plan, change.attempt)
