"""The cost of single steps on a kind of machine, each number with its source.

MEASURED numbers were timed by this project (docs/hardware.md), PUBLISHED ones are a vendor's, ASSUMED ones are guesses
that a measurement should replace. A prediction is no better than the worst number in it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import Enum


class Source(str, Enum):
    """The source of a number."""

    MEASURED = "measured"
    PUBLISHED = "published"
    ASSUMED = "assumed"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A number in SI units, and its origin."""

    value: float
    source: Source
    origin: str


def measured(value: float, origin: str) -> Cost:
    return Cost(value=value, source=Source.MEASURED, origin=origin)


def published(value: float, origin: str) -> Cost:
    return Cost(value=value, source=Source.PUBLISHED, origin=origin)


def assumed(value: float, origin: str) -> Cost:
    return Cost(value=value, source=Source.ASSUMED, origin=origin)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds, bytes and bytes per second.

    Attributes:
        per_node, hbm_bytes: devices of a node; memory of one.
        cores_per_node: how many joining ranks of a node can boot at full speed together.
        new_column_s: one new column: create, export, import, map, set access; on the CPU also its fresh pages.
        old_column_s: one departed column: unmap and release.
        message_s: one command from the Coordinator, which sends them one by one.
        near_copy, far_copy: one device's rate to a peer in its node, and to another node.
        boot_s: from a standby to the commit barrier without copying weights: attach, build the model.
        capture_s: capturing the joining rank's graphs; cold_capture_s: those of a new server, with compiling.
        commit_s: from when the last rank is ready until all have passed the commit barrier.
        commit_rank_s: what each further rank adds to that.
        cold_boot_s: a new server's start without its weights and graphs.
        load_rate: reading a checkpoint, one node.
        memory_rate, far_latency_s: a device's own memory; one all-to-all step across the group.
    """

    name: str
    per_node: int
    hbm_bytes: Cost
    cores_per_node: Cost
    new_column_s: Cost
    old_column_s: Cost
    message_s: Cost
    near_copy: Cost
    far_copy: Cost
    boot_s: Cost
    capture_s: Cost
    cold_capture_s: Cost
    commit_s: Cost
    commit_rank_s: Cost
    cold_boot_s: Cost
    load_rate: Cost
    memory_rate: Cost
    far_latency_s: Cost

    def numbers(self) -> list[tuple[str, Cost]]:
        """All costs by name."""
        return [(f.name, value) for f in fields(self) if isinstance(value := getattr(self, f.name), Cost)]


_VMM = "per-call times of the driver on H200: create 10 us, export 36, import 20, map 2, set access 28"
_CHANGES = (
    "results/cuda-changes-*-h100.json and cuda-scaling-h200.json, Qwen3-30B-A3B with 16 layers, ranks share one GPU"
)

H200 = Costs(
    name="H200",
    per_node=8,
    hbm_bytes=measured(139 * 2**30, "memory that the driver reports"),
    cores_per_node=assumed(8, "each joining rank of a node has its own core"),
    new_column_s=measured(96e-6, _VMM),
    old_column_s=measured(32e-6, "unmap 17 us, release 15 us"),
    message_s=assumed(0.2e-3, "a message between processes of one host and its handling"),
    near_copy=measured(394e9, "NVLink copy of 432 MiB and more between two H200"),
    far_copy=assumed(45e9, "one 400 Gbit/s network port per device at 90 %"),
    boot_s=measured(2.6, f"preparing a rank from a ready standby, median 4.6 s, less its capture; {_CHANGES}"),
    capture_s=measured(2.0, "graphs of a joining rank whose kernels are compiled: docs/hardware.md"),
    cold_capture_s=measured(66.0, "cold start of Qwen3-30B-A3B: compiling and capturing, on a slow virtual machine"),
    commit_s=measured(34.7e-3, f"the phase `committing`, median of 34; {_CHANGES}"),
    commit_rank_s=assumed(20e-6, "one more arrival at the commit barrier"),
    cold_boot_s=measured(45.0, "cold start of Qwen3-30B-A3B without compiling and capturing, rounded"),
    load_rate=assumed(10e9, "local NVMe drives"),
    memory_rate=published(4.8e12, "data sheet"),
    far_latency_s=assumed(30e-6, "one exchange between all devices"),
)

ASCEND_910C = replace(
    H200,
    name="910C (one die per device)",
    per_node=16,
    hbm_bytes=published(64 * 2**30, "data sheet: 128 GiB per package of two dies"),
    new_column_s=assumed(96e-6, "as on H200"),
    old_column_s=assumed(32e-6, "as on H200"),
    near_copy=published(196e9, "unified bus: 392 GB/s per package of two dies"),
    far_copy=published(196e9, "unified bus, the same across the nodes of one supernode"),
    cores_per_node=assumed(16, "each joining rank of a node has its own core"),
    boot_s=assumed(2.6, "as on H200"),
    capture_s=assumed(2.0, "as on H200"),
    cold_capture_s=assumed(66.0, "as on H200"),
    commit_s=assumed(34.7e-3, "as on H200"),
    cold_boot_s=assumed(45.0, "as on H200"),
    memory_rate=published(1.6e12, "data sheet: 3.2 TB/s per package of two dies"),
)

MACHINES = {"h200": H200, "910c": ASCEND_910C}
