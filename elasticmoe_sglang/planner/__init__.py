"""[3] The planner: turns a target into a plan, without any I/O.

Receives the membership, the placement and the target (a size, ranks to retire, or ranks to restore) from the
coordinator [2] and returns a `ScalePlan`: joining ranks, retiring ranks and the moves of expert columns. The new
placement is balanced to within one column per rank, with the fewest moves that any balanced placement allows. The same
arguments give the same plan.
"""

from elasticmoe_sglang.planner.budget import DeviceRoom, ModelNeeds, check_budgets, extra_bytes
from elasticmoe_sglang.planner.kv import KvDevice, KvShape, kv_shape
from elasticmoe_sglang.planner.placement import Placement, initial_placement
from elasticmoe_sglang.planner.plan import ColumnMove, RestoreRanks, RetireRanks, ScalePlan, ScaleTo, Target, plan_scale

__all__ = [
    "ColumnMove",
    "DeviceRoom",
    "KvDevice",
    "KvShape",
    "ModelNeeds",
    "Placement",
    "RestoreRanks",
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
