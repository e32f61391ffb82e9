"""The ledger: a budget of bytes a device, charges by kind, and the peak. Pure bookkeeping, no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from elasticmoe_sglang.errors import BudgetExceeded, UserInputError
from elasticmoe_sglang.wire.to_hmm import KINDS, DeviceUsage, Kind


@dataclass(kw_only=True)
class _Account:
    budget: int
    used: int = 0
    peak: int = 0
    by_kind: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))


class Ledger:
    """Charges and refunds bytes; refuses a charge that exceeds the device's budget by as little as one byte.

    Args:
        budgets: bytes of each device, device number = index.
    """

    def __init__(self, budgets: Sequence[int]) -> None:
        self._devices = len(budgets)
        self._accounts = {device: _Account(budget=budget) for device, budget in enumerate(budgets)}
        self._watches: dict[str, list[int]] = {}

    @property
    def devices(self) -> int:
        return self._devices

    def require(self, device: int, nbytes: int) -> None:
        """Raises BudgetExceeded when `nbytes` more do not fit on `device` now, UserInputError for no such device."""
        account = self._account(device)
        if account.used + nbytes <= account.budget:
            return
        free = account.budget - account.used
        raise BudgetExceeded(
            f"device {device} has {free} of {account.budget} bytes free, {nbytes} are needed",
            device=device,
            needed=nbytes,
            free=free,
            budget=account.budget,
            hint=f"Raise the budget of device {device} by {nbytes - free} bytes, or release memory on it.",
        )

    def charge(self, device: int, kind: Kind, nbytes: int) -> None:
        """Counts `nbytes` of `kind` as used on `device`, or raises as `require` and changes nothing."""
        self.require(device, nbytes)
        self.count(device, kind, nbytes)

    def count(self, device: int, kind: Kind, nbytes: int) -> None:
        """The same for memory that is in use already, whatever the budget says."""
        account = self._account(device)
        account.used += nbytes
        account.by_kind[kind] += nbytes
        account.peak = max(account.peak, account.used)
        for peaks in self._watches.values():
            peaks[device] = max(peaks[device], account.used)

    def refund(self, device: int, kind: Kind, nbytes: int) -> None:
        """Takes a charge back."""
        account = self._account(device)
        assert nbytes <= account.by_kind[kind], f"refund of {nbytes} {kind} bytes that were never charged on {device}"
        account.used -= nbytes
        account.by_kind[kind] -= nbytes

    def used(self, device: int) -> int:
        """Bytes in use on one device."""
        return self._account(device).used

    def usage(self) -> list[DeviceUsage]:
        """All devices; kinds that use nothing are left out."""
        return [self._usage(device) for device in range(self._devices)]

    def watch(self, key: str) -> None:
        """Starts recording each device's peak under `key`, from what is in use now."""
        self._watches[key] = [self.used(device) for device in range(self._devices)]

    def unwatch(self, key: str) -> list[int]:
        """Ends a recording and returns the peak of each device."""
        return self._watches.pop(key)

    def _usage(self, device: int) -> DeviceUsage:
        account = self._accounts[device]
        return DeviceUsage(
            device=device,
            budget=account.budget,
            used=account.used,
            by_kind={kind: used for kind, used in account.by_kind.items() if used},
            peak=account.peak,
        )

    def _account(self, device: int) -> _Account:
        account = self._accounts.get(device)
        if account is None:
            raise UserInputError(
                f"device {device} does not exist", hint=f"This HMM has devices 0 to {self._devices - 1}."
            )
        return account
