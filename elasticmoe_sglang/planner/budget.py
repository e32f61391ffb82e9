"""Whether a plan fits the devices' memory while old and new placement are held at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from elasticmoe_sglang.errors import BudgetExceeded
from elasticmoe_sglang.planner.plan import TransitionPlan
from elasticmoe_sglang.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class ModelNeeds:
    """Memory of the model on a device, in bytes.

    Attributes:
        column_bytes: one expert column, rounded up to the device's allocation granularity.
        dense_bytes: everything but the experts, or a rank's part of it; one copy per device, shared by the ranks that
            have the same.
        rank_bytes: private memory of each active rank (its smallest KV cache).
        replica_size: ranks of an attention replica, each of which has another part of the dense weights.
    """

    column_bytes: int
    dense_bytes: int
    rank_bytes: int = 0
    replica_size: int = 1


@dataclass(frozen=True, kw_only=True)
class DeviceRoom:
    """One device in the HMM's ledger, in bytes; `ranks` are all ranks of the device, active or not."""

    device: int
    ranks: tuple[int, ...]
    budget: int
    used: int
    holds_dense: bool

    @property
    def free(self) -> int:
        return self.budget - self.used


def extra_bytes(plan: TransitionPlan, model: ModelNeeds, room: DeviceRoom) -> int:
    """Bytes that `plan` allocates on one device before it releases any.

    Survivors keep their old columns until the finishing phase, so columns that move away are not subtracted.
    """
    joining = [rank for rank in room.ranks if rank in plan.joining]
    columns = sum(len(plan.incoming(rank)) for rank in room.ranks)
    parts = {rank % model.replica_size for rank in joining}
    if model.replica_size > 1:
        parts -= {rank % model.replica_size for rank in room.ranks if rank in plan.before.ranks}
    elif room.holds_dense:
        parts = set()
    return columns * model.column_bytes + len(parts) * model.dense_bytes + len(joining) * model.rank_bytes


def check_budgets(plan: TransitionPlan, model: ModelNeeds, devices: Sequence[DeviceRoom]) -> None:
    """Refuse a plan that exceeds the budget of a device.

    Raises:
        BudgetExceeded: its text lists every device that is too small; its attributes describe the first one.
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
    same = plan.before.ranks == plan.after.ranks
    what = f"placing {len(plan.moves)} columns anew" if same else f"EP size {len(plan.after.ranks)}"
    other = "Allow fewer copies (elasticmoe rebalance --copies N)" if same else "Ask for more ranks"
    raise BudgetExceeded(
        f"{what} does not fit: {listed}",
        device=room.device,
        needed=need,
        free=room.free,
        budget=room.budget,
        hint=f"{other}, or start the HMM with a larger --budget",
    )
