"""[4] HMM: the sidecar that owns device memory.

From the coordinator it receives transactions (begin, commit, rollback), from ranks allocations, seals and requests for
handles; it hands out memory, never bytes. `client` and `space` are what other processes use, `server` is the sidecar.
Importing this package loads none of them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elasticmoe_sglang.hmm.client import AsyncHmmClient, HmmClient, RegionHandle
    from elasticmoe_sglang.hmm.config import Endpoint, HmmConfig
    from elasticmoe_sglang.hmm.layout import ColumnLayout, DenseLayout, TensorSpec
    from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
    from elasticmoe_sglang.hmm.server import HmmServer, serve_hmm
    from elasticmoe_sglang.hmm.space import ColumnSpace, DenseSpace, PullStats
    from elasticmoe_sglang.wire.to_hmm import Block, HmmStatus, Kind, ModelSpec, TxnReport

__all__ = [
    "AsyncHmmClient",
    "Block",
    "ColumnLayout",
    "ColumnSpace",
    "DenseLayout",
    "DenseSpace",
    "Endpoint",
    "HmmClient",
    "HmmConfig",
    "HmmProcess",
    "HmmServer",
    "HmmStatus",
    "Kind",
    "ModelSpec",
    "PullStats",
    "RegionHandle",
    "TensorSpec",
    "TxnReport",
    "serve_hmm",
    "spawn_hmm",
]

_HOMES = {
    "client": ("AsyncHmmClient", "HmmClient", "RegionHandle"),
    "config": ("Endpoint", "HmmConfig"),
    "layout": ("ColumnLayout", "DenseLayout", "TensorSpec"),
    "process": ("HmmProcess", "spawn_hmm"),
    "protocol": ("Block", "HmmStatus", "Kind", "ModelSpec", "TxnReport"),
    "server": ("HmmServer", "serve_hmm"),
    "space": ("ColumnSpace", "DenseSpace", "PullStats"),
}
_home_of = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _home_of:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_home_of[name]}"), name)
