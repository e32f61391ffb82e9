"""[3] The planner: from a wish to a plan, without any I/O.

Receives from the coordinator [2] the membership, the placement and the wish (a size, or seats to retire) and gives it
back a `ScalePlan`: who joins, who leaves, which expert column moves from where to where. Balanced to within one column
a seat, with as few moves as any balanced placement allows, and the same plan for the same question every time.
"""

from elasticmoe_sglang.planner.budget import DeviceRoom, ModelNeeds, check_budgets, extra_bytes
from elasticmoe_sglang.planner.kv import KvDevice, KvShape, kv_shape
from elasticmoe_sglang.planner.placement import Placement, initial_placement
from elasticmoe_sglang.planner.plan import ColumnMove, RetireSeats, ScalePlan, ScaleTo, Wish, plan_scale

__all__ = [
    "ColumnMove",
    "DeviceRoom",
    "KvDevice",
    "KvShape",
    "ModelNeeds",
    "Placement",
    "RetireSeats",
    "ScalePlan",
    "ScaleTo",
    "Wish",
    "check_budgets",
    "extra_bytes",
    "initial_placement",
    "kv_shape",
    "plan_scale",
]
