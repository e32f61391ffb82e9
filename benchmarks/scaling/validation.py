"""The error of the simulation against measurements: changes of a real server here, and recorded ones on GPUs.

On this machine the costs of single steps are fitted on some changes and predict the others; the recorded changes are
predicted from the costs that predict machines that are not available.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from benchmarks.scaling.costs import H200, Costs, measured
from benchmarks.scaling.methods import Elastic, MethodFailed, warm_up
from benchmarks.scaling.records import ChangeRecord
from benchmarks.scaling.servers import ServerSettings
from benchmarks.scaling.simulation import Weights, moves_between, predict

FITTED = ((1, 2), (2, 1))
"""The smallest change up gives the boot; the smallest one down gives the commit and what a column costs."""
SIZES = (1, 2, 1, 3, 1, 4, 2, 4, 3, 1)
"""Sizes of the measured server one after the other, in each round."""
ROUNDS = 3
RESULTS = Path(__file__).parents[1] / "results"
RECORDED = ("cuda-changes-*h100.json", "cuda-scaling-h200.json")
_WAITED_S = 20.0
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
    where: str = "this machine"

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
            await method.standby_ready()
            # The ranks that joined last, and the standby, have settled.
            await asyncio.sleep(1.0)
            record = await method.change(size)
            if record.error is not None:
                raise MethodFailed(f"{record.old_size} -> {size}: {record.error}")
            if number >= len(_FIRST):
                points.setdefault((record.old_size, size), []).append(_point(record))
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
    """Costs of this machine: boot, commit and column from the points of `FITTED`, copies at `copy_rate`, one node."""
    up = [point for point in points if (point.old_size, point.new_size) == FITTED[0]]
    down = [point for point in points if (point.old_size, point.new_size) == FITTED[1]]
    assert up and down, "the points to fit on are always measured"
    commit = sum(point.latency_s - point.prepare_s for point in (*up, *down)) / (len(up) + len(down))
    moved = len(moves_between(weights.columns, *FITTED[1]))
    spent = sum(point.prepare_s for point in down) / len(down)
    column = max(0.0, spent / moved - weights.column_bytes / copy_rate)
    here = replace(
        H200,
        name="this machine's CPU",
        per_node=64,
        cores_per_node=measured(os.cpu_count() or 1, "cores"),
        near_copy=measured(copy_rate, "memory copy"),
        new_column_s=measured(column, "fitted"),
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


def recorded_checks(costs: Costs, columns: int = 128) -> list[Check]:
    """Changes that were recorded on GPUs, each kind's median, with what these costs predict.

    Their ranks shared one GPU and their weights were dummies, so nothing was copied: boot, capture, mapping and commit
    are checked, not copies, and the boot was taken from the changes up. One that had to wait for a standby is left out.
    """
    found: dict[tuple[int, int], list[Point]] = {}
    for path in sorted(path for pattern in RECORDED for path in RESULTS.glob(pattern)):
        for row in json.loads(path.read_text())["sections"]["changes"]["rows"]:
            timings = row["timings"]
            prepare = timings["preparing_ms"] / 1e3
            if prepare < _WAITED_S:
                found.setdefault((row["from"], row["to"]), []).append(
                    Point(
                        old_size=row["from"], new_size=row["to"], prepare_s=prepare,
                        latency_s=prepare + timings["committing_ms"] / 1e3, bytes_moved=0,
                    )
                )  # fmt: skip
    weights = Weights(columns=columns, column_bytes=0, dense_bytes=0)
    return [
        Check(
            point=_median(points), predicted_s=predict(costs, weights, old, new).scale_latency_s, fitted=new > old,
            where=f"one H100 or H200, n = {len(points)}",
        )
        for (old, new), points in found.items()
    ]  # fmt: skip


def largest_error(checks: Sequence[Check], *, up: bool) -> float:
    """The largest factor between prediction and measurement, of those that were not fitted, in one direction."""
    factors = [
        max(c.predicted_s / c.point.latency_s, c.point.latency_s / c.predicted_s)
        for c in checks
        if not c.fitted and (c.point.new_size > c.point.old_size) is up
    ]
    return max(factors)


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


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a measurement: the changes, and the rate of a memory copy at that time, bytes a second."""

    copy_rate: float
    points: list[Point]


def read_measured(path: Path) -> Measured:
    return msgspec.json.decode(path.read_bytes(), type=Measured)
