"""Does a plan fit the devices' memory, at the moment when old and new placement are held together?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elasticmoe_sglang.errors import BudgetExceeded
from elasticmoe_sglang.planner.plan import ScalePlan
from elasticmoe_sglang.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class ModelNeeds:
    """What the model takes on a device, in bytes.

    Attributes:
        column_bytes: one expert column, rounded up to the device's allocation granularity.
        dense_bytes: everything that is not an expert; once a device, shared by its ranks.
        rank_bytes: what each active rank takes for itself (its smallest KV pool, for example).
    """

    column_bytes: int
    dense_bytes: int
    rank_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class DeviceRoom:
    """One device as the HMM's ledger sees it now, in bytes; `ranks` are all that sit on it, active or not."""

    device: int
    ranks: tuple[int, ...]
    budget: int
    used: int
    holds_dense: bool

    @property
    def free(self) -> int:
        return self.budget - self.used


def extra_bytes(plan: ScalePlan, model: ModelNeeds, room: DeviceRoom) -> int:
    """Bytes that `plan` allocates on one device before it can give any back.

    A survivor holds its old columns until the change is finished, so nothing that leaves is subtracted.
    """
    joining = [rank for rank in room.ranks if rank in plan.joining]
    columns = sum(len(plan.incoming(rank)) for rank in room.ranks)
    dense = model.dense_bytes if joining and not room.holds_dense else 0
    return columns * model.column_bytes + dense + len(joining) * model.rank_bytes


def check_budgets(plan: ScalePlan, model: ModelNeeds, devices: Sequence[DeviceRoom]) -> None:
    """Refuse a plan that some device has no room for.

    Raises:
        BudgetExceeded: names every device that is too small, with its numbers; the attributes describe the first one.
    """
    short = [(room, need) for room in devices if (need := extra_bytes(plan, model, room)) > room.free]
    if not short:
        return
    listed = "; ".join(
        f"device {room.device} needs {format_bytes(need)} more and has {format_bytes(room.free)} free "
        f"of {format_bytes(room.budget)}"
        for room, need in short
    )
    room, need = short[0]
    raise BudgetExceeded(
        f"EP size {len(plan.after.ranks)} does not fit: {listed}",
        device=room.device,
        needed=need,
        free=room.free,
        budget=room.budget,
        hint="Ask for more ranks, or start the HMM with a larger --budget",
    )
