"""[3] The planner: turns a target or a loss into a plan, without any I/O.

Receives the view (membership and placement) and a target (a size, ranks to retire or to restore) or the ranks whose
workers died from the engine [2] and returns a `TransitionPlan`: joining ranks, retiring ranks and the moves of expert
columns. The new placement is balanced to within one owned column per rank, with the fewest moves that any balanced
placement allows; copies of columns come on top, and are made by measured load. The same arguments give the same plan.
"""

from elasticmoe_sglang.planner.budget import DeviceRoom, ModelNeeds, check_budgets, extra_bytes
from elasticmoe_sglang.planner.kv import KvDevice, KvShape, kv_shape
from elasticmoe_sglang.planner.placement import TURNS, Placement, View, initial_placement
from elasticmoe_sglang.planner.plan import (
    Cause,
    ColumnMove,
    RestoreRanks,
    RetireRanks,
    ScaleTo,
    Target,
    TransitionPlan,
    plan_loss,
    plan_restore,
    plan_target,
    whole_replicas,
)
from elasticmoe_sglang.planner.rebalance import Rebalance, imbalance, rank_loads

__all__ = [
    "TURNS",
    "Cause",
    "ColumnMove",
    "DeviceRoom",
    "KvDevice",
    "KvShape",
    "ModelNeeds",
    "Placement",
    "Rebalance",
    "RestoreRanks",
    "RetireRanks",
    "ScaleTo",
    "Target",
    "TransitionPlan",
    "View",
    "check_budgets",
    "extra_bytes",
    "imbalance",
    "initial_placement",
    "kv_shape",
    "plan_loss",
    "plan_restore",
    "plan_target",
    "rank_loads",
    "whole_replicas",
]
