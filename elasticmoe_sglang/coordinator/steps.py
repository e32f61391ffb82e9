"""What the engine hears and asks for: events in, effects out. Plain values, without any I/O.

A step is one call of a port (`ports.py`), which the driver makes. Its result, or the exception that it raised, comes
back as `StepEnded`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elasticmoe_sglang.coordinator.status import Phase
from elasticmoe_sglang.errors import ElasticMoEError
from elasticmoe_sglang.planner import ColumnMove, Target, TransitionPlan
from elasticmoe_sglang.wire.to_worker import JoinSpec

# Steps --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AwaitMemory:
    """Wait until the HMM's ledger is whole, while an HMM that has ended is replaced."""


@dataclass(frozen=True, kw_only=True)
class CheckRoom:
    """Raise BudgetExceeded when the plan does not fit the devices."""

    plan: TransitionPlan


@dataclass(frozen=True, kw_only=True)
class ReadMemory:
    """The ledger, `MemoryStatus`; `after`: at the end of the change, not before it."""

    after: bool


@dataclass(frozen=True, kw_only=True)
class Begin:
    """Open an HMM transaction; the result is its name."""

    operation_id: str


@dataclass(frozen=True, kw_only=True)
class DropKv:
    """Release the KV memory of lost ranks."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ShrinkKv:
    """Shrink KV by what incoming columns need; the result maps joining ranks to the KV chunks they start with."""

    plan: TransitionPlan


@dataclass(frozen=True, kw_only=True)
class Boot:
    """Have a standby worker boot for a rank; the result is a `PullReport`."""

    join_spec: JoinSpec


@dataclass(frozen=True, kw_only=True)
class Pull:
    """Have a survivor pull columns; the result is a `PullReport`."""

    rank: int
    txn: str
    moves: tuple[ColumnMove, ...]


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Send the commit command and wait for all reports; the result is a `CommitReport`.

    Attributes:
        expires: when the engine gives it up, in the engine's time.
    """

    plan: TransitionPlan
    operation_id: str
    attempt: int
    expires: float


@dataclass(frozen=True, kw_only=True)
class Withdraw:
    """Decide ABORT for a proposal that has no decision yet; the result is a `Withdrawal`."""

    plan: TransitionPlan
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Pauses:
    """The pauses of these ranks, milliseconds by rank, as far as they are measured."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Route:
    """Route new requests to these ranks only."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Migrate:
    """Have survivors resume a retiring rank's requests; the result is their number."""

    rank: int
    operation_id: str


@dataclass(frozen=True, kw_only=True)
class SpreadWaiting:
    """Have ranks give requests that wait there, and have not begun, to joining ranks; the result is their number."""

    ranks: tuple[int, ...]
    joining: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Resend:
    """Send open requests that are on no rank again; the result is their number.

    Attributes:
        operation_id: of a commit that the ranks answer with their requests; empty: ask them.
        forget: ranks that ended while they retired: what has arrived of them is not complete.
    """

    operation_id: str
    forget: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CommitMemory:
    """Keep what was allocated in the transaction; the result is each device's peak in bytes."""

    txn: str


@dataclass(frozen=True, kw_only=True)
class RollBackMemory:
    """Free what was allocated in the transaction; the result is each device's peak in bytes."""

    txn: str


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Have a survivor unmap what it pulled."""

    rank: int
    txn: str
    moves: tuple[ColumnMove, ...]


@dataclass(frozen=True, kw_only=True)
class Dismiss:
    """End a joining rank's worker, whatever the state of its boot, or wait for the exit of a retiring rank's."""

    rank: int


@dataclass(frozen=True, kw_only=True)
class Release:
    """Release columns that moved away from a rank."""

    rank: int
    columns: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class GrowKv:
    """Grow KV into all free memory."""


@dataclass(frozen=True, kw_only=True)
class Tidy:
    """Release memory that no rank uses."""


@dataclass(frozen=True, kw_only=True)
class Kill:
    """End the worker of a rank that others miss in a collective and that does not answer; or, not `stalled`, of one
    that shares an attention replica with a lost rank."""

    rank: int
    pid: int
    stalled: bool = True


Step = (
    AwaitMemory
    | CheckRoom
    | ReadMemory
    | Begin
    | DropKv
    | ShrinkKv
    | Boot
    | Pull
    | Commit
    | Withdraw
    | Pauses
    | Route
    | Migrate
    | SpreadWaiting
    | Resend
    | CommitMemory
    | RollBackMemory
    | Drop
    | Dismiss
    | Release
    | GrowKv
    | Tidy
    | Kill
)


def describe(step: Step) -> str:
    """The step in the words of "could not ..."."""
    match step:
        case ReadMemory():
            return "read the ledger"
        case CommitMemory():
            return "commit the HMM transaction"
        case RollBackMemory():
            return "roll back the HMM transaction"
        case GrowKv():
            return "grow KV"
        case DropKv():
            return "release the KV of lost ranks"
        case Pauses():
            return "read the measured pauses"
        case Route():
            return "route requests to the active ranks"
        case Boot(join_spec=spec):
            return f"boot a worker for rank {spec.rank}"
        case Pull(rank=rank):
            return f"pull columns to rank {rank}"
        case Commit(plan=plan):
            return f"commit epoch {plan.after.epoch}"
        case Migrate(rank=rank):
            return f"migrate the requests of retiring rank {rank}"
        case SpreadWaiting(joining=joining):
            return f"give waiting requests to joining ranks {list(joining)}"
        case Resend():
            return "send requests again"
        case Drop(rank=rank):
            return f"drop the columns that rank {rank} pulled"
        case Dismiss(rank=rank):
            return f"dismiss rank {rank}"
        case Release(rank=rank):
            return f"release the columns that left rank {rank}"
        case Tidy():
            return "release memory that no rank uses"
        case _:
            return type(step).__name__.lower()


# Events -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepEnded:
    """A step has its result or its exception, or was cancelled."""

    number: int
    result: object = None
    error: Exception | None = None
    cancelled: bool = False


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A target. `plan`: for the view when it was asked for, checked against the devices' budgets."""

    operation_id: str
    target: Target
    plan: TransitionPlan


@dataclass(frozen=True, kw_only=True)
class WorkerUp:
    """A worker was assigned to a rank; its pid tells it from the rank's earlier ones."""

    rank: int
    pid: int


@dataclass(frozen=True, kw_only=True)
class WorkerGone:
    """A worker has ended."""

    rank: int
    pid: int


@dataclass(frozen=True, kw_only=True)
class RankBroken:
    """A collective of a rank has failed in this epoch; it waits for the next. `culprit`: the rank it missed, -1 when
    unknown."""

    rank: int
    epoch: int
    culprit: int


@dataclass(frozen=True, kw_only=True)
class StandbysReady:
    """So many standby workers can boot for a rank now."""

    count: int


@dataclass(frozen=True, kw_only=True)
class MemoryHeld:
    """The HMM's ledger is not whole (`reason`), or is again (None)."""

    reason: ElasticMoEError | None


@dataclass(frozen=True, kw_only=True)
class Closing:
    """The server is to stop."""


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time has passed."""


Event = StepEnded | Wanted | WorkerUp | WorkerGone | RankBroken | StandbysReady | MemoryHeld | Closing | Tick

# Effects ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Start:
    """Make this call. operation_id: the operation that it belongs to, empty for none."""

    number: int
    step: Step
    operation_id: str


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Cancel this call; its end is reported all the same."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An operation begins with this plan, or begins again with another one."""

    operation_id: str
    plan: TransitionPlan


@dataclass(frozen=True, kw_only=True)
class Advanced:
    """An operation enters a phase; `error` says why it failed or was rolled back."""

    operation_id: str
    phase: Phase
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class WakeAt:
    """Nothing happens before this time unless an event comes; None: not at all."""

    time: float | None


@dataclass(frozen=True, kw_only=True)
class EndServer:
    """Serving cannot go on; a sentence."""

    reason: str


Effect = Start | Cancel | Opened | Advanced | WakeAt | EndServer


def joined(problems: Sequence[str]) -> str:
    return "; ".join(problems)
