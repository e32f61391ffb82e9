"""[3] The planner: from a target to a plan, without any I/O.

Receives from the coordinator [2] the membership, the placement and the target (a size, or ranks to retire) and gives it
back a `ScalePlan`: who joins, who leaves, which expert column moves from where to where. Balanced to within one column
a rank, with as few moves as any balanced placement allows, and the same plan for the same question every time.
"""

from elasticmoe_sglang.planner.budget import DeviceRoom, ModelNeeds, check_budgets, extra_bytes
from elasticmoe_sglang.planner.kv import KvDevice, KvShape, kv_shape
from elasticmoe_sglang.planner.placement import Placement, initial_placement
from elasticmoe_sglang.planner.plan import ColumnMove, RetireRanks, ScalePlan, ScaleTo, Target, plan_scale

__all__ = [
    "ColumnMove",
    "DeviceRoom",
    "KvDevice",
    "KvShape",
    "ModelNeeds",
    "Placement",
    "RetireRanks",
    "ScalePlan",
    "ScaleTo",
    "Target",
    "check_budgets",
    "extra_bytes",
    "initial_placement",
    "kv_shape",
    "plan_scale",
]
