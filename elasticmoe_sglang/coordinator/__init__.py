"""[2] The coordinator: one change at a time, as a transaction.

Receives a target from the api [1], lets the planner [3] make a plan of it, and drives the HMM [4] and the ranks [5, 6]
through prepare, commit and finish by way of two ports (`ports.py`). What goes wrong before the commit is undone, each
step exactly once; what goes wrong after it is reported loudly, and the new membership stays.
"""

from elasticmoe_sglang.coordinator.coordinator import HISTORY, Coordinator
from elasticmoe_sglang.coordinator.ports import (
    CommitReport,
    MemoryPort,
    PullReport,
    WorkersPort,
)
from elasticmoe_sglang.coordinator.status import (
    DeviceMemory,
    MemoryStatus,
    Operation,
    Phase,
    RankInfo,
    RankState,
    Status,
)

__all__ = [
    "HISTORY",
    "CommitReport",
    "Coordinator",
    "DeviceMemory",
    "MemoryPort",
    "MemoryStatus",
    "Operation",
    "Phase",
    "PullReport",
    "RankInfo",
    "RankState",
    "Status",
    "WorkersPort",
]
