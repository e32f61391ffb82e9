"""Every error this project raises on purpose.

ElasticMoEError
├── UserInputError (also ValueError)      what a caller asked for is malformed or impossible; HTTP 400
│   ├── PlanError                         the wish does not lead to a legal membership
│   └── BudgetExceeded                    the experts or KV of the wish do not fit the devices' budgets
├── OperationInProgress                   a change is running already; HTTP 409
├── HmmError                              the memory sidecar refused or failed
│   ├── HmmUnavailable                    nobody answers at its endpoint; HTTP 503
│   ├── ModelMismatch                     the HMM holds a different model, dtype or revision
│   └── ProtocolError                     a malformed or unexpected message
├── VmmError                              a virtual-memory call failed
├── CollectiveError                       a collective among the seats could not finish
│   ├── PeerTimeout                       a seat stalled past the deadline
│   ├── PeerDied                          a seat's process is gone
│   └── CollectiveMismatch                seats called different collectives, or with different sizes
├── CommitError                           the commit gate was not passed; the change is rolled back
├── SeatError                             a seat's process failed to boot, join or leave
└── HookError                             SGLang is not what the hooks were written for; ends the launch
"""

from __future__ import annotations


class ElasticMoEError(Exception):
    """What happened, where (seat, epoch, operation), and what to do about it.

    Args:
        what: one sentence, no trailing full stop needed.
        seat / epoch / operation: where it happened; left out of the text when None.
        hint: what the reader can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        seat: int | None = None,
        epoch: int | None = None,
        operation: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.seat = seat
        self.epoch = epoch
        self.operation = operation
        self.hint = hint
        super().__init__(self._text())

    def _text(self) -> str:
        named = (("seat", self.seat), ("epoch", self.epoch), ("operation", self.operation))
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
    """The wish does not lead to a legal membership."""


class BudgetExceeded(UserInputError):
    """The experts or KV of the wish do not fit the devices' budgets.

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
        seat: int | None = None,
        operation: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.device = device
        self.needed = needed
        self.free = free
        self.budget = budget
        super().__init__(what, seat=seat, operation=operation, hint=hint)


class OperationInProgress(ElasticMoEError):
    """A change is running already; one at a time."""


class HmmError(ElasticMoEError):
    """The memory sidecar refused or failed."""


class HmmUnavailable(HmmError):
    """Nobody answers at the HMM's endpoint."""


class ModelMismatch(HmmError):
    """The HMM holds a different model, dtype or revision."""


class ProtocolError(HmmError):
    """A malformed or unexpected message."""


class VmmError(ElasticMoEError):
    """A virtual-memory call failed."""


class CollectiveError(ElasticMoEError):
    """A collective among the seats could not finish."""


class PeerTimeout(CollectiveError):
    """A seat stalled past the deadline of a collective."""


class PeerDied(CollectiveError):
    """A seat's process is gone."""


class CollectiveMismatch(CollectiveError):
    """Seats called different collectives, or with different sizes."""


class CommitError(ElasticMoEError):
    """The commit gate was not passed; the change is rolled back."""


class SeatError(ElasticMoEError):
    """A seat's process failed to boot, join or leave."""


class HookError(ElasticMoEError):
    """SGLang is not what the hooks were written for."""
