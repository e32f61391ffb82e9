"""The commit barrier: the participants of a change meet, and one decision holds for all of them.

Phase one: the old members and the joining ranks arrive, each by writing the change's proposal (epoch, attempt) into its
own word. Phase two: the leader (rank 0) decides, COMMIT once all have arrived in time, ABORT when the deadline has
passed or a participant dies, and the others wait for its decision. With a COMMIT the new view is published.

There is one decision because it is one word, written under a file lock on the region (the kernel frees it when its
holder dies) and only when there is none for this proposal yet. So when the leader is gone or stuck, the first follower
that notices decides ABORT, and a leader that wakes up late finds that and obeys. The coordinator, too, writes ABORT
before it gives a change up (`withdraw`), so that no commit can follow. A proposal is used once: a change that is tried
again for the same epoch takes the next attempt number.

Joining ranks wait here, asleep, for as long as preparing takes; the leader's proposal wakes them.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

from elasticmoe_sglang.comm import futex
from elasticmoe_sglang.comm.control_page import BARRIER_ARRIVAL, BARRIER_WORD, ControlPage
from elasticmoe_sglang.comm.membership import LEADER, Membership, mask_to_ranks, ranks_to_mask
from elasticmoe_sglang.errors import CommitError
from elasticmoe_sglang.planner import View

POLL_S = 0.02
FOLLOWER_GRACE_S = 2.0
"""How much longer than the leader's deadline the others wait for its decision."""

COORDINATOR = -1
"""In place of a rank, for a process that withdraws proposals and never arrives."""

_ATTEMPT_BITS = 16
MAX_ATTEMPTS = (1 << _ATTEMPT_BITS) - 1
"""Tries to reach one epoch."""
_LOCK_S = 1.0
# Words, in cache lines of their own: decision | arrivals bell | proposal
_VERDICT, _VERDICT_MASK, _DECISION_BELL = (BARRIER_WORD + i for i in range(3))
_ARRIVALS_BELL = BARRIER_WORD + 8
_PROPOSAL, _PARTICIPANTS, _PROPOSAL_BELL = (BARRIER_WORD + 16 + i for i in range(3))


class Decision(IntEnum):
    """What the commit barrier decided."""

    COMMIT = 1
    ABORT = 2


class _Reason(IntEnum):
    NONE = 0
    LATE = 1
    DIED = 2
    EXPIRED = 3
    WITHDRAWN = 4


_REASONS = {
    _Reason.NONE: "",
    _Reason.LATE: "rank {rank} did not arrive or decide in time",
    _Reason.DIED: "the process of rank {rank} is gone",
    _Reason.EXPIRED: "all ranks arrived, but after the deadline",
    _Reason.WITHDRAWN: "the coordinator has withdrawn the proposal",
}


def _proposal(epoch: int, attempt: int) -> int:
    # Never 0, which is what the words of an unused barrier hold.
    return (epoch << _ATTEMPT_BITS | attempt) + 1


def _epoch_of(proposal: int) -> int:
    return (proposal - 1) >> _ATTEMPT_BITS


@dataclass(frozen=True, kw_only=True)
class _Verdict:
    """A decision with its proposal, one word in the page, so that it is read whole."""

    proposal: int
    decision: Decision
    reason: _Reason
    culprit: int

    def pack(self) -> int:
        return self.proposal << 16 | self.culprit << 8 | self.reason << 4 | self.decision

    @classmethod
    def unpack(cls, word: int) -> _Verdict:
        return cls(
            proposal=word >> 16,
            decision=Decision(word & 0xF),
            reason=_Reason(word >> 4 & 0xF),
            culprit=word >> 8 & 0xFF,
        )


class Attempts:
    """Numbers the proposals for each epoch from 1 on."""

    def __init__(self) -> None:
        self._epoch = -1
        self._last = 0

    def next(self, epoch: int) -> int:
        """Raises CommitError when the epoch has been tried too often for a proposal's word."""
        self._epoch, self._last = epoch, self._last + 1 if epoch == self._epoch else 1
        if self._last > MAX_ATTEMPTS:
            raise CommitError(f"{MAX_ATTEMPTS} attempts have failed", epoch=epoch, hint="Restart the server")
        return self._last


class CommitBarrier:
    """A rank's end of the commit barrier.

    Args:
        control: the control page of the server. Its descriptor must stay open: the lock is taken on it.
        rank: this process's rank, registered (`ControlPage.register_worker`); COORDINATOR for one that only withdraws.
        alive: tells whether a rank's worker runs; the control page's own check by default.

    Attributes:
        reason: why the last change was aborted, in words.
    """

    def __init__(self, control: ControlPage, rank: int, alive: Callable[[int], bool] | None = None) -> None:
        self._control = control
        self._words = control.words
        self._rank = rank
        self._alive = control.alive if alive is None else alive
        self.reason = ""

    def arrive(
        self,
        *,
        epoch: int,
        participants: tuple[int, ...],
        view: View,
        timeout_s: float,
        attempt: int = 0,
        grace_s: float = FOLLOWER_GRACE_S,
    ) -> Decision:
        """Meet the other participants and return the decision. Every old member calls it between two batches.

        Args:
            epoch, attempt: the change; the same on all, and never used before.
            participants: old members and joining ranks, rank 0 among them.
            view: what COMMIT makes the committed view; only the leader's is published.
            timeout_s: how long the leader waits for the others.
            grace_s: how much longer the others wait for the leader.

        Returns:
            COMMIT or ABORT, the same for all participants.

        Raises:
            CommitError: the leader died or did not decide in time (then ABORT holds for all), or the commit barrier has
                gone on to a later change without this rank.
        """
        assert LEADER in participants and self._rank in participants
        assert view.epoch == epoch
        proposal = _proposal(epoch, attempt)
        self.reason = ""
        if self._rank == LEADER:
            return self._lead(proposal, participants, view, timeout_s)
        self._announce_arrival(proposal)
        return self._follow(proposal, time.monotonic() + timeout_s + grace_s)

    def join(self, epoch: int, *, timeout_s: float, grace_s: float = FOLLOWER_GRACE_S) -> Decision:
        """For a joining rank: sleep until the leader proposes a change to `epoch` that names this rank, then arrive.

        Returns ABORT when that change was aborted; the caller may call again and wait for the next attempt. After
        COMMIT the view is `control.read_view()`.

        Raises:
            CommitError: no proposal came within `timeout_s`, the leader died, or the epoch was reached without this
                rank.
        """
        deadline = time.monotonic() + timeout_s
        words = self._words
        mine = 1 << self._rank
        # A proposal that was decided before we came was not for us.
        lowest = max(_proposal(epoch, 0), self._decided() + 1)
        self.reason = ""
        while True:
            bell = words[_PROPOSAL_BELL]
            futex.full_fence()
            proposal = words[_PROPOSAL]
            if lowest <= proposal and _epoch_of(proposal) == epoch and words[_PARTICIPANTS] & mine:
                self._announce_arrival(proposal)
                return self._follow(proposal, deadline + grace_s)
            if _epoch_of(proposal) > epoch:
                raise self._error(f"the commit barrier went on to epoch {_epoch_of(proposal)}", epoch)
            if not self._alive(LEADER):
                raise self._error("the leader (rank 0) died before it proposed the change", epoch, rank=LEADER)
            if time.monotonic() >= deadline:
                raise self._error(f"no change to epoch {epoch} was proposed within {timeout_s:g} s", epoch)
            self._sleep(_PROPOSAL_BELL, bell, 5 * POLL_S)

    def withdraw(self, epoch: int, attempt: int) -> Decision:
        """Decide ABORT for a proposal that has no decision yet, whether or not it was made.

        Returns:
            The decision that holds. After COMMIT the new view is published.

        Raises:
            CommitError: the decision word's lock was not free in time.
        """
        proposal = _proposal(epoch, attempt)
        self.reason = ""
        return self._decide(proposal, Decision.ABORT, _Reason.WITHDRAWN, 0, None)

    def _decided(self) -> int:
        return self._words[_VERDICT] >> 16

    def _lead(self, proposal: int, participants: tuple[int, ...], view: View, timeout_s: float) -> Decision:
        words = self._words
        words[_PARTICIPANTS] = ranks_to_mask(participants)
        futex.order_stores()
        words[_PROPOSAL] = proposal
        futex.add_one_and_wake(self._address(_PROPOSAL_BELL))
        deadline = time.monotonic() + timeout_s
        arrivals = {rank: self._control.rank_word(rank, BARRIER_ARRIVAL) for rank in participants if rank != LEADER}
        next_check = time.monotonic()
        while True:
            bell = words[_ARRIVALS_BELL]
            futex.full_fence()
            if self._decided() >= proposal:
                return self._obey(proposal)  # a follower or the coordinator decided without this leader
            missing = [rank for rank, word in arrivals.items() if words[word] != proposal]
            now = time.monotonic()
            if not missing:
                if now >= deadline:  # whoever asked for this change may have given it up
                    return self._decide(proposal, Decision.ABORT, _Reason.EXPIRED, 0, None)
                return self._decide(proposal, Decision.COMMIT, _Reason.NONE, 0, view)
            if now >= next_check:
                next_check = now + POLL_S
                dead = [rank for rank in missing if not self._alive(rank)]
                if dead:
                    return self._decide(proposal, Decision.ABORT, _Reason.DIED, dead[0], None)
            if now >= deadline:
                return self._decide(proposal, Decision.ABORT, _Reason.LATE, missing[0], None)
            self._sleep(_ARRIVALS_BELL, bell, POLL_S)

    def _follow(self, proposal: int, deadline: float) -> Decision:
        words = self._words
        next_check = time.monotonic()
        while True:
            bell = words[_DECISION_BELL]
            futex.full_fence()
            if self._decided() >= proposal:
                return self._obey(proposal)
            now = time.monotonic()
            if now >= next_check:
                next_check = now + POLL_S
                if not self._alive(LEADER):
                    return self._decide(proposal, Decision.ABORT, _Reason.DIED, LEADER, None)
            if now >= deadline:
                return self._decide(proposal, Decision.ABORT, _Reason.LATE, LEADER, None)
            self._sleep(_DECISION_BELL, bell, POLL_S)

    def _announce_arrival(self, proposal: int) -> None:
        futex.order_stores()
        self._words[self._control.rank_word(self._rank, BARRIER_ARRIVAL)] = proposal
        futex.add_one_and_wake(self._address(_ARRIVALS_BELL))

    def _decide(self, proposal: int, decision: Decision, reason: _Reason, culprit: int, view: View | None) -> Decision:
        words = self._words
        with self._lock(_epoch_of(proposal)):
            if self._decided() < proposal:
                if view is not None:
                    words[_VERDICT_MASK] = view.membership.mask
                    self._control.stage_placement(view.placement)
                futex.order_stores()
                verdict = _Verdict(proposal=proposal, decision=decision, reason=reason, culprit=culprit)
                words[_VERDICT] = verdict.pack()  # decided from here on
                self._publish(verdict)
        futex.add_one_and_wake(self._address(_DECISION_BELL))
        return self._obey(proposal)

    def _publish(self, verdict: _Verdict) -> None:
        """Make a COMMIT's view the committed one, once. Under the lock."""
        epoch = _epoch_of(verdict.proposal)
        if verdict.decision is Decision.COMMIT and not self._published(epoch):
            ranks = mask_to_ranks(self._words[_VERDICT_MASK])
            self._control.publish_staged(Membership(ranks=ranks, epoch=epoch, capacity=self._control.capacity))

    def _published(self, epoch: int) -> bool:
        return self._control.has_membership and self._control.read_membership().epoch >= epoch

    def _obey(self, proposal: int) -> Decision:
        epoch = _epoch_of(proposal)
        verdict = _Verdict.unpack(self._words[_VERDICT])
        futex.order_stores()
        if verdict.proposal != proposal:
            # The same epoch: this attempt was aborted, or there would be no next. A later epoch: we missed a commit.
            if _epoch_of(verdict.proposal) == epoch:
                self.reason = "the commit barrier went on to the next attempt"
                return Decision.ABORT
            raise self._error("the commit barrier went on to a later change without this rank", epoch)
        if verdict.decision is Decision.COMMIT:
            if not self._published(epoch):  # the rank that decided died before it could publish
                with self._lock(epoch):
                    self._publish(verdict)
            return verdict.decision
        self.reason = _REASONS[verdict.reason].format(rank=verdict.culprit)
        accused = verdict.reason in (_Reason.LATE, _Reason.DIED)
        if accused and verdict.culprit == LEADER and self._rank not in (LEADER, COORDINATOR):
            raise CommitError(self.reason, rank=LEADER, epoch=epoch, operation="commit barrier")
        return verdict.decision

    @contextmanager
    def _lock(self, epoch: int) -> Iterator[None]:
        # A record lock belongs to the process and goes when that dies. It is held for microseconds; a process that was
        # stopped within them must not hang the others.
        descriptor = self._control.shared.fd
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 8, 8 * _VERDICT)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise self._error(f"another rank kept the commit barrier's lock for {_LOCK_S:g} s", epoch) from None
                time.sleep(50e-6)
        try:
            yield
        finally:
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 8, 8 * _VERDICT)

    def _address(self, word: int) -> int:
        return self._control.shared.address + 8 * word

    def _sleep(self, word: int, seen: int, limit_s: float) -> None:
        futex.wait(self._address(word), seen & 0xFFFFFFFF, limit_s)

    def _error(self, what: str, epoch: int, rank: int | None = None) -> CommitError:
        return CommitError(what, rank=self._rank if rank is None else rank, epoch=epoch, operation="commit barrier")
