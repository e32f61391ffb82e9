"""The errors that this project raises. The HTTP API and the command line tell them apart by class.

ElasticMoEError
├── UserInputError (also ValueError)      a request or setting is malformed or impossible; HTTP 400
│   ├── PlanError                         the target is no legal membership
│   ├── UnsupportedFeature                the model or a flag is not supported; refused at launch
│   └── BudgetExceeded                    experts or KV do not fit the devices' budgets
├── OperationInProgress                   a change is running; HTTP 409
├── OperationIdTaken                      the operation's id was used for another target; HTTP 409
├── StaleRequest                          the request was made for another instance or generation; HTTP 409
├── TooManyReaders                        no more clients can follow the events; HTTP 503
├── HmmError                              the memory sidecar refused or failed
│   ├── HmmUnavailable                    no HMM answers at its endpoint; HTTP 503
│   ├── HmmTaken                          the HMM serves another server
│   ├── ModelMismatch                     the HMM holds another model, dtype or revision
│   ├── BlockNotFound                     no such block, or it was released
│   ├── RegionMismatch                    a shared region exists with another size
│   ├── SealTimeout                       awaited blocks were not filled in time
│   ├── TransactionError                  a transaction is unknown, over, expired or another client's
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
├── CollectiveError                       a collective among the ranks failed
│   ├── PeerTimeout                       a rank did not come within the deadline
│   ├── PeerDied                          a rank's worker is gone
│   ├── CollectiveMismatch                ranks called different collectives, or with different sizes
│   └── RankInactive                      a root or peer is not among the active ranks
├── CommitError                           the commit barrier was not passed; the change is rolled back
├── WorkerError                           a worker failed to boot, join or retire
└── HookError                             SGLang is not what the hooks were written for; ends the launch
"""

from __future__ import annotations


class ElasticMoEError(Exception):
    """What happened, where (rank, epoch, operation), and what to do about it.

    Args:
        what: one sentence without a full stop.
        rank, epoch, operation: where it happened; None is left out of the text.
        hint: what to do about it.
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
        # Exceptions are pickled between processes; the default would lose the keyword arguments.
        return _rebuild, (type(self), dict(self.__dict__), self.args)


def _rebuild(cls: type[ElasticMoEError], state: dict[str, object], args: tuple[object, ...]) -> ElasticMoEError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class UserInputError(ElasticMoEError, ValueError):
    """A request or setting is malformed or impossible; HTTP 400."""


class PlanError(UserInputError):
    """The target is no legal membership."""


class UnsupportedFeature(UserInputError):
    """The model or a flag is not supported; refused at launch."""


def refused_sentence(name: str, why: str) -> str:
    """What a client is told of a field or an endpoint that is refused."""
    return f"{name} is not supported by an elastic server: {why}"


class BudgetExceeded(UserInputError):
    """Experts or KV do not fit the devices' budgets.

    Args:
        device: the device that is too small.
        needed, free, budget: bytes.
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
    """Another change is running, and one runs at a time; HTTP 409."""


class OperationIdTaken(ElasticMoEError):
    """The id names an operation with another target; HTTP 409."""


class StaleRequest(ElasticMoEError):
    """The server or its membership is not the one that the request was made for; HTTP 409."""


class RoutingUnknown(ElasticMoEError):
    """How tokens are routed could not be observed, or too few tokens came to tell; HTTP 409."""


class TooManyReaders(ElasticMoEError):
    """No more clients can follow the server's events; HTTP 503."""


class HmmError(ElasticMoEError):
    """The HMM refused a call or failed; HTTP 503."""


class HmmUnavailable(HmmError):
    """No HMM answers at the endpoint."""


class HmmTaken(HmmError):
    """The HMM serves another server, which is running."""


class ModelMismatch(HmmError):
    """The HMM holds a different model, dtype or revision."""


class BlockNotFound(HmmError):
    """The block of memory does not exist or was released."""


class RegionMismatch(HmmError):
    """A shared region of this name exists with another size."""


class SealTimeout(HmmError):
    """Blocks were not sealed in time."""


class TransactionError(HmmError):
    """A transaction is unknown, has ended or expired, or belongs to another client."""


class UndoFailed(TransactionError):
    """Steps of a transaction could not be undone; the text lists them."""


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
    """An argument, a handle or the order of calls was wrong."""


class OutOfDeviceMemory(DriverError):
    """The device has no room left."""


class DriverRefused(DriverError):
    """The process lacks the permission for this call."""


class DriverUnsupported(DriverError):
    """The driver or the device does not support the call."""


class DeviceFault(DriverError):
    """The device or its driver is broken, or cannot be reached."""


class CollectiveError(ElasticMoEError):
    """A collective of the ranks failed."""


class PeerTimeout(CollectiveError):
    """A rank missed the deadline of a collective."""


class PeerDied(CollectiveError):
    """A rank's worker has died."""


class CollectiveMismatch(CollectiveError):
    """Ranks called different collectives, or with different sizes."""


class RankInactive(CollectiveError):
    """The root or peer of a collective is not an active rank."""


class CommitError(ElasticMoEError):
    """The commit barrier did not commit; the change is rolled back."""


class WorkerError(ElasticMoEError):
    """A worker failed, or its part of a change did."""


class HookError(ElasticMoEError):
    """SGLang is not what the hooks were written for; ends the launch."""
