"""The error of the simulation against a measurement: changes of a real server on this machine.

The costs of single steps are fitted on some changes and predict the others.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from benchmarks.scaling.costs import H200, Costs, measured
from benchmarks.scaling.methods import Elastic, MethodFailed, warm_up
from benchmarks.scaling.records import ChangeRecord
from benchmarks.scaling.servers import ServerSettings
from benchmarks.scaling.simulation import Weights, predict

FITTED = ((1, 2), (2, 1))
"""The smallest change up gives the boot, the smallest one down gives the commit."""
SIZES = (1, 2, 1, 3, 1, 4, 2, 4, 3, 1)
"""Sizes of the measured server one after the other, in each round."""
ROUNDS = 3
_FIRST = (4, 1)
"""Sizes before the rounds: the first time that a rank joins costs more than any later time."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One measured change, seconds."""

    old_size: int
    new_size: int
    prepare_s: float
    latency_s: float
    bytes_moved: int


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A measured change and its prediction; `fitted` if its costs come from this very point."""

    point: Point
    predicted_s: float
    fitted: bool

    @property
    def error(self) -> float:
        """Relative, positive where the prediction is too long."""
        return self.predicted_s / self.point.latency_s - 1


async def measure(settings: ServerSettings, sizes: Sequence[int] = SIZES) -> list[Point]:
    """Change an idle server through the sizes, `ROUNDS` times; the median of each change.

    Raises MethodFailed for a change that fails.
    """
    method = Elastic(settings, max(*sizes, *_FIRST))
    points: dict[tuple[int, int], list[Point]] = {}
    try:
        await method.start(sizes[0])
        await warm_up(method, sizes[0])
        for number, size in enumerate((*_FIRST, *(list(sizes[1:]) * ROUNDS))):
            record = await method.change(size)
            if record.error is not None:
                raise MethodFailed(f"{record.old_size} -> {size}: {record.error}")
            if number >= len(_FIRST):
                points.setdefault((record.old_size, size), []).append(_point(record))
            # A new standby replaces the one that was used.
            await asyncio.sleep(1.0)
    finally:
        await method.stop()
    return [_median(found) for found in points.values()]


def _median(points: Sequence[Point]) -> Point:
    middle = sorted(points, key=lambda point: point.latency_s)
    return middle[len(middle) // 2]


def _point(record: ChangeRecord) -> Point:
    timings = record.detail["timings"]
    spent = [timings[name] or 0.0 for name in ("planned_ms", "preparing_ms", "committing_ms")]
    return Point(
        old_size=record.old_size,
        new_size=record.new_size,
        prepare_s=spent[1] / 1e3,
        latency_s=sum(spent) / 1e3,
        bytes_moved=record.detail["bytes_moved"],
    )


def fit(points: Sequence[Point], weights: Weights, copy_rate: float) -> Costs:
    """Costs of this machine: boot and commit from the points of `FITTED`, copies at `copy_rate`, all on one node."""
    up = [point for point in points if (point.old_size, point.new_size) == FITTED[0]]
    down = [point for point in points if (point.old_size, point.new_size) == FITTED[1]]
    assert up and down, "the points to fit on are always measured"
    commit = sum(point.latency_s - point.prepare_s for point in (*up, *down)) / (len(up) + len(down))
    here = replace(
        H200,
        name="this machine's CPU",
        per_node=64,
        cores_per_node=measured(os.cpu_count() or 1, "cores"),
        near_copy=measured(copy_rate, "memory copy"),
        message_s=measured(1e-4, "a message between two processes"),
        boot_s=measured(0.0, "fitted"),
        commit_s=measured(commit, "fitted"),
        commit_rank_s=measured(0.0, "fitted"),
    )
    rest = predict(here, weights, *FITTED[0], capture=False).prepare_s
    boot = sum(point.prepare_s for point in up) / len(up) - rest
    return replace(here, boot_s=measured(max(0.0, boot), f"fitted on {FITTED[0][0]} -> {FITTED[0][1]}"))


def check(points: Sequence[Point], weights: Weights, costs: Costs) -> list[Check]:
    """Every measured change with its prediction."""
    return [
        Check(
            point=point,
            predicted_s=predict(costs, weights, point.old_size, point.new_size, capture=False).scale_latency_s,
            fitted=(point.old_size, point.new_size) in FITTED,
        )
        for point in points
    ]


def measure_copy_rate(nbytes: int = 64 << 20) -> float:
    """Bytes per second of one memory copy into fresh pages, as a pull is."""
    import ctypes
    import mmap
    import time

    source = mmap.mmap(-1, nbytes)
    source.write(bytes(nbytes))
    rates = []
    for _ in range(3):
        target = mmap.mmap(-1, nbytes)
        to, origin = (ctypes.addressof(ctypes.c_char.from_buffer(area)) for area in (target, source))
        started = time.perf_counter()
        ctypes.memmove(to, origin, nbytes)
        rates.append(nbytes / (time.perf_counter() - started))
    return sorted(rates)[1]


def read_points(path: Path) -> list[Point]:
    return msgspec.json.decode(path.read_bytes(), type=list[Point])
