"""Every payload of the HTTP side. Imports nothing heavy: clients use these structs to read the answers."""

from __future__ import annotations

import msgspec

from elasticmoe_sglang.coordinator.status import (
    DeviceMemory,
    DevicePeak,
    MemoryStatus,
    Move,
    Operation,
    Phase,
    RankInfo,
    RankState,
    Status,
    Timings,
)

__all__ = [
    "DeviceMemory",
    "DevicePeak",
    "ErrorBody",
    "MemoryStatus",
    "Move",
    "Operation",
    "OperationList",
    "Phase",
    "RankInfo",
    "RankState",
    "ScaleRequest",
    "ScalingState",
    "Status",
    "Timings",
]


class ScaleRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Body of POST /scale_elastic_ep. Exactly one of the first three is given.

    Attributes:
        new_ep_size: number of ranks to occupy (SGLang's word).
        new_data_parallel_size: the same (vLLM's word).
        retire_ranks: these active ranks leave.
        operation_id: a name for the operation; a repeat with it returns the same operation.
        wait: answer when the operation has ended.
    """

    new_ep_size: int | None = None
    new_data_parallel_size: int | None = None
    retire_ranks: list[int] | None = None
    operation_id: str | None = None
    wait: bool = False


class ScalingState(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of /is_scaling_elastic_ep, in upstream's words (SGLang `TokenizerManager.get_elastic_ep_state`).

    Attributes:
        scale_phase: idle, waiting_for_cohort, syncing_new_world, serving_expanded, serving_shrunk or failed.
    """

    is_scaling_elastic_ep: bool
    effective_ep_size: int
    pending_ep_size: int | None
    scale_phase: str
    last_error: str | None


class OperationList(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of GET /elastic_ep/operations, newest first."""

    operations: list[Operation]


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every answer with a status of 400 or more; SGLang's own shape."""

    error: str
