"""Every error this project raises on purpose.

ElasticMoEError
├── UserInputError (also ValueError)      what a caller asked for is malformed or impossible; HTTP 400
│   ├── PlanError                         the target does not lead to a legal membership
│   ├── UnsupportedFeature                the model or a flag needs what this project does not do
│   └── BudgetExceeded                    the experts or KV of the target do not fit the devices' budgets
├── OperationInProgress                   a change is running already; HTTP 409
├── HmmError                              the memory sidecar refused or failed
│   ├── HmmUnavailable                    nobody answers at its endpoint; HTTP 503
│   ├── ModelMismatch                     the HMM holds a different model, dtype or revision
│   ├── BlockNotFound                     no such block, or it was released
│   ├── RegionMismatch                    a shared region exists with another size
│   ├── SealTimeout                       awaited blocks were not filled in time
│   ├── TransactionError                  a transaction is unknown, over, expired or somebody else's
│   │   └── UndoFailed                    a step could not be undone; the ledger needs a look
│   └── ProtocolError                     a malformed or unexpected message
│       └── MalformedMessage              bytes that are no valid message
├── VmmError                              a virtual-memory call failed
│   └── DriverError                       a device driver answered with an error code
│       ├── BadDriverCall                 the call broke a rule of the driver
│       ├── OutOfDeviceMemory             the device has no room left
│       ├── DriverRefused                 the process may not do that
│       ├── DriverUnsupported             the driver or the device cannot do that
│       └── DeviceFault                   the device or its driver is broken
├── CollectiveError                       a collective among the ranks could not finish
│   ├── PeerTimeout                       a rank stalled past the deadline
│   ├── PeerDied                          a worker is gone
│   ├── CollectiveMismatch                ranks called different collectives, or with different sizes
│   └── RankInactive                        a root or peer that is not among the active ranks
├── CommitError                           the commit barrier was not passed; the change is rolled back
├── PhaseTimeout                          a phase of a change took longer than its deadline
├── WorkerError                             a worker failed to boot, join or leave
└── HookError                             SGLang is not what the hooks were written for; ends the launch
"""

from __future__ import annotations


class ElasticMoEError(Exception):
    """What happened, where (rank, epoch, operation), and what to do about it.

    Args:
        what: one sentence, no trailing full stop needed.
        rank / epoch / operation: where it happened; left out of the text when None.
        hint: what the reader can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        rank: int | None = None,
        epoch: int | None = None,
        operation: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.rank = rank
        self.epoch = epoch
        self.operation = operation
        self.hint = hint
        super().__init__(self._text())

    def _text(self) -> str:
        named = (("rank", self.rank), ("epoch", self.epoch), ("operation", self.operation))
        where = ", ".join(f"{name} {value}" for name, value in named if value is not None)
        text = self.what + (f" ({where})" if where else "")
        return f"{text}. {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders; the default would lose the keyword arguments.
        return _rebuild, (type(self), dict(self.__dict__), self.args)


def _rebuild(cls: type[ElasticMoEError], state: dict[str, object], args: tuple[object, ...]) -> ElasticMoEError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class UserInputError(ElasticMoEError, ValueError):
    """What a caller asked for is malformed or impossible."""


class PlanError(UserInputError):
    """The target does not lead to a legal membership."""


class UnsupportedFeature(UserInputError):
    """The model or a flag needs what this project does not do; refused at launch."""


class BudgetExceeded(UserInputError):
    """The experts or KV of the target do not fit the devices' budgets.

    Args:
        device: the device that is too small.
        needed, free, budget: bytes: asked for, left of the budget, the budget.
    """

    def __init__(
        self,
        what: str,
        *,
        device: int | None = None,
        needed: int | None = None,
        free: int | None = None,
        budget: int | None = None,
        rank: int | None = None,
        operation: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.device = device
        self.needed = needed
        self.free = free
        self.budget = budget
        super().__init__(what, rank=rank, operation=operation, hint=hint)


class OperationInProgress(ElasticMoEError):
    """A change is running already; one at a time."""


class HmmError(ElasticMoEError):
    """The memory sidecar refused or failed."""


class HmmUnavailable(HmmError):
    """Nobody answers at the HMM's endpoint."""


class ModelMismatch(HmmError):
    """The HMM holds a different model, dtype or revision."""


class BlockNotFound(HmmError):
    """No such block of memory, or it was released."""


class RegionMismatch(HmmError):
    """A shared region of that name exists with another size."""


class SealTimeout(HmmError):
    """Blocks that somebody waited for were not filled and sealed in time."""


class TransactionError(HmmError):
    """A transaction is unknown, over already, expired, or belongs to another client."""


class UndoFailed(TransactionError):
    """A step of a transaction could not be undone. What is left over is listed in the text."""


class ProtocolError(HmmError):
    """A malformed or unexpected message."""


class MalformedMessage(ProtocolError):
    """Bytes that are no valid message; `request_id` is "" where not even that could be read."""

    def __init__(self, what: str, *, request_id: str = "", hint: str | None = None) -> None:
        self.request_id = request_id
        super().__init__(what, hint=hint)


class VmmError(ElasticMoEError):
    """A virtual-memory call failed."""


class DriverError(VmmError):
    """A device driver answered a memory call with an error code.

    Args:
        code: the driver's own number (ACL: aclError); 0 where a call does not exist at all.
    """

    def __init__(self, what: str, *, code: int, operation: str | None = None, hint: str | None = None) -> None:
        self.code = code
        super().__init__(what, operation=operation, hint=hint)


class BadDriverCall(DriverError):
    """The call broke a rule of the driver: an argument, a handle or an order of calls."""


class OutOfDeviceMemory(DriverError):
    """The device has no room left."""


class DriverRefused(DriverError):
    """The process may not do that."""


class DriverUnsupported(DriverError):
    """The driver or the device cannot do that."""


class DeviceFault(DriverError):
    """The device or its driver is broken, or cannot be reached."""


class CollectiveError(ElasticMoEError):
    """A collective among the ranks could not finish."""


class PeerTimeout(CollectiveError):
    """A rank stalled past the deadline of a collective."""


class PeerDied(CollectiveError):
    """A worker is gone."""


class CollectiveMismatch(CollectiveError):
    """Ranks called different collectives, or with different sizes."""


class RankInactive(CollectiveError):
    """A collective names a root or a peer that is not among the active ranks."""


class CommitError(ElasticMoEError):
    """The commit barrier was not passed; the change is rolled back."""


class PhaseTimeout(ElasticMoEError):
    """A phase of a change took longer than its deadline."""


class WorkerError(ElasticMoEError):
    """A worker failed to boot, join or leave."""


class HookError(ElasticMoEError):
    """SGLang is not what the hooks were written for."""
