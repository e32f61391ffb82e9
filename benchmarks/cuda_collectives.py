"""On one NVIDIA GPU: the ranks' collectives inside CUDA graphs, column pulls, and what the driver's memory calls cost.

    python -m benchmarks.cuda_collectives --json benchmarks/results/cuda-h200.json

Several ranks share the GPU, so MPS must run (`scripts/gpu_all.sh`). Times are medians; a collective's time is a replay
of a graph of 20, divided by 20, of the slowest rank, host-synchronised before each replay. The floor is the time
that a plain device copy takes to move the same bytes at the rate measured in the same call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.scaling.machine import describe
from elasticmoe_kernels.triton import collectives
from elasticmoe_kernels.triton.windows import WindowLayout
from elasticmoe_sglang.hmm.space import ColumnSpace
from elasticmoe_sglang.hmm.vmm import VmmHandle, round_up
from elasticmoe_sglang.hmm.vmm.cuda import CudaBackend
from tests.helpers.device_workers import DeviceContext, DevicePool

SIZES = (32 << 10, 256 << 10, 1 << 20, 2 << 20, 8 << 20)
"""Bytes per rank."""
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_reduce_sliced")
_IN_GRAPH = 20
_COLUMN = 432 << 20
"""Bytes of one expert column of Qwen3-30B-A3B (48 layers, 3 x 2048 x 768 bfloat16)."""


def _launch(context: DeviceContext, name: str, big: torch.Tensor, small: torch.Tensor) -> None:
    windows, group = context.device.windows, context.everybody
    if name == "all_gather":
        collectives.all_gather(windows, group, big, small, zero_absent=True)
    elif name == "reduce_scatter":
        collectives.reduce_scatter(windows, group, small, big)
    else:
        collectives.all_reduce(windows, group, small, small, sliced=name.endswith("sliced"))


def capture(context: DeviceContext, sizes: tuple[int, ...]) -> None:
    """Graphs of every collective and size, captured alone."""
    context.region.solo()
    graphs: dict[Any, Any] = {}
    context.device.__dict__["graphs"] = graphs
    for nbytes in sizes:
        small = torch.zeros(nbytes // 2, dtype=torch.bfloat16, device="cuda")
        big = torch.zeros(nbytes // 2 * context.region.capacity, dtype=torch.bfloat16, device="cuda")
        for name in COLLECTIVES:
            _launch(context, name, big, small)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(_IN_GRAPH):
                    _launch(context, name, big, small)
            graphs[name, nbytes] = graph, small, big  # a graph does not keep its tensors alive


def measure(context: DeviceContext, ranks: tuple[int, ...], epoch: int, sizes: tuple[int, ...]) -> dict[str, float]:
    """Microseconds of each collective, as "name/bytes"."""
    context.adopt(ranks, epoch)
    taken = {}
    for nbytes in sizes:
        for name in COLLECTIVES:
            graph, _, _ = context.device.__dict__["graphs"][name, nbytes]
            times = []
            for _ in range(12):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) * 1e3 / _IN_GRAPH)
            taken[f"{name}/{nbytes}"] = statistics.median(times[2:])
            context.device.check()
    return taken


def _collective_rows(ranks: int, capacity: int, blocks: int, copy_rate: float) -> list[dict[str, Any]]:
    layout = WindowLayout(capacity=capacity, blocks=blocks)
    with tempfile.TemporaryDirectory(prefix="em") as folder:
        pool = DevicePool(
            capacity, folder=Path(folder), backend="cuda", layout=layout, ranks=range(ranks), timeout_s=20.0
        )
        try:
            pool.run(range(ranks), capture, SIZES)
            members, epoch = tuple(range(ranks)), pool.next_epoch()
            found = pool.run(members, measure, members, epoch, SIZES)
        finally:
            pool.close()
    rows = []
    for key in found[0]:
        name, nbytes = key.split("/")
        slowest = max(taken[key] for taken in found.values())
        moved = _bytes_moved(name, int(nbytes), ranks, capacity) * ranks
        rows.append(
            {
                "collective": name,
                "bytes_per_rank": int(nbytes),
                "ranks": ranks,
                "capacity": capacity,
                "blocks": blocks,
                "us": round(slowest, 2),
                "floor_us": round(moved / copy_rate * 1e6, 2),
            }
        )
    return rows


def _bytes_moved(name: str, nbytes: int, ranks: int, capacity: int) -> int:
    """Least bytes read and written by one rank: each input once, each output once, windows not counted."""
    if name == "all_gather":
        return nbytes * ranks + nbytes * capacity
    if name == "reduce_scatter":
        return nbytes * ranks + nbytes
    return nbytes * ranks + nbytes


def _copy_rate() -> float:
    """Bytes read and written a second by a device-to-device copy of a column's size."""
    source = torch.empty(_COLUMN, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * _COLUMN / statistics.median(times[2:])


def _pulls() -> dict[str, float]:
    """Bytes of columns pulled a second, by `ColumnSpace.pull`: mapping, copying and unmapping the source included.

    The source stays allocated, as it does in the HMM. Its handle has been fetched; the call costs include that.
    """
    backend = CudaBackend()
    rates = {}
    owner = backend.create(round_up(_COLUMN, backend.granularity), 0)
    fd = backend.export(owner)
    for name, limit, threads in (
        ("unlimited", None, 1),
        ("limit 200 GB/s", 200e9, 1),
        ("limit 20 GB/s", 20e9, 1),
        ("4 columns at once", None, 4),
    ):
        rates[name] = _pull_rate(backend, fd, limit, threads)
    os.close(fd)
    backend.close(owner)
    return rates


def _pull_rate(backend: CudaBackend, fd: int, limit: float | None, threads: int) -> float:
    """Of `threads` slots filled four times over, each by its own thread."""
    space = ColumnSpace(backend, threads, _COLUMN)
    for slot in range(threads):
        space.map_column(slot, backend.create(space.pitch, 0))
    taken = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2 if limit else 6):
            sources = [[backend.import_(os.dup(fd), space.pitch, 0) for _ in range(4)] for _ in range(threads)]
            started = time.perf_counter()
            for done in [pool.submit(_pull_all, space, slot, sources[slot], limit) for slot in range(threads)]:
                done.result()
            taken.append(time.perf_counter() - started)
    for slot in range(threads):
        space.unmap_column(slot)
    space.close()
    return 4 * threads * _COLUMN / statistics.median(taken)


def _pull_all(space: ColumnSpace, slot: int, sources: list[VmmHandle], limit: float | None) -> None:
    for source in sources:
        space.pull(slot, source, bytes_per_second=limit)


def _waits() -> dict[str, float]:
    """Microseconds of `copy` for few and for many bytes: the cost of waiting, and of a column."""
    backend = CudaBackend()
    va = backend.reserve(2 * _COLUMN)
    handles = [backend.create(_COLUMN, 0) for _ in range(2)]
    for index, handle in enumerate(handles):
        backend.map(va.base + index * _COLUMN, handle)
    result = {}
    for nbytes in (4096, 8 << 20, 64 << 20, _COLUMN):
        times = []
        for _ in range(20):
            started = time.perf_counter()
            backend.copy(va.base, va.base + _COLUMN, nbytes)
            times.append((time.perf_counter() - started) * 1e6)
        result[str(nbytes)] = round(statistics.median(times), 1)
    for index, handle in enumerate(handles):
        backend.unmap(va.base + index * _COLUMN, _COLUMN)
        backend.close(handle)
    backend.release_va(va)
    return result


def _call_costs(size: int) -> dict[str, float]:
    """Microseconds of each call on one handle of `size` bytes, medians of 30."""
    backend = CudaBackend()
    taken: dict[str, list[float]] = {}

    def timed(name: str, call: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = call(*arguments)
        taken.setdefault(name, []).append((time.perf_counter() - started) * 1e6)
        return result

    for _ in range(30):
        va = timed("reserve", backend.reserve, size)
        handle = timed("create", backend.create, size, 0)
        fd = timed("export", backend.export, handle)
        again = timed("import", backend.import_, fd, size, 0)
        timed("map + set access", backend.map, va.base, again)
        timed("close", backend.close, again)
        timed("unmap", backend.unmap, va.base, size)
        timed("release (last)", backend.close, handle)
        timed("release_va", backend.release_va, va)
    return {name: round(statistics.median(times), 1) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cuda-h200.json"))
    parser.add_argument("--configurations", default="2:2:32,4:4:32,2:8:32", help="ranks:capacity:blocks, ...")
    arguments = parser.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    copy_rate = _copy_rate()
    pulls = _pulls()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "machine": describe(),
        "command": "scripts/gpu_all.sh",
        "mps": _mps_serves(),
        "copy_rate_bytes_read_and_written_per_s": copy_rate,
        "column_bytes": _COLUMN,
        "pull_bytes_per_s": pulls,
        "pull_of_copy_rate": 2 * pulls["unlimited"] / copy_rate,
        "call_us": {str(size): _call_costs(size) for size in (2 << 20, 28 << 20, _COLUMN)},
        "copy_us_by_bytes": _waits(),
        "collectives": [],
    }
    torch.cuda.empty_cache()
    for configuration in arguments.configurations.split(","):
        ranks, capacity, blocks = map(int, configuration.split(":"))
        result["collectives"] += _collective_rows(ranks, capacity, blocks, copy_rate)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{configuration} measured", flush=True)
    _print_table(result)


def _mps_serves() -> bool:
    """Whether a server of the MPS daemon that the environment names is running, this process being its client."""
    if "CUDA_MPS_PIPE_DIRECTORY" not in os.environ:
        return False
    asked = subprocess.run(
        ["nvidia-cuda-mps-control"], input="get_server_list\n", capture_output=True, text=True, timeout=20
    )
    return asked.returncode == 0 and bool(asked.stdout.strip())


def _print_table(result: dict[str, Any]) -> None:
    print(f"\n{result['device']}, MPS {'on' if result['mps'] else 'OFF'}")
    print(f"copy {result['copy_rate_bytes_read_and_written_per_s'] / 1e12:.2f} TB/s read + written")
    for name, rate in result["pull_bytes_per_s"].items():
        print(f"pull of a column, {name}: {rate / 1e9:.1f} GB/s")
    print(f"unlimited pull against the plain copy: {result['pull_of_copy_rate']:.2f}")
    print("copy, us:", ", ".join(f"{int(n) >> 10} KiB {us}" for n, us in result["copy_us_by_bytes"].items()))
    for size, calls in result["call_us"].items():
        print(f"calls on {int(size) >> 20} MiB, us:", ", ".join(f"{name} {us}" for name, us in calls.items()))
    print(f"{'us (floor)':38}" + "".join(f"{size >> 10:>15} KiB" for size in SIZES))
    keys = {(r["ranks"], r["capacity"], r["blocks"], r["collective"]): None for r in result["collectives"]}
    for key in keys:
        rows = [r for r in result["collectives"] if (r["ranks"], r["capacity"], r["blocks"], r["collective"]) == key]
        label = f"{key[0]}/{key[1]} ranks, {key[2]} blocks, {key[3]}"
        print(f"{label:38}" + "".join(f"{r['us']:>10.1f} ({r['floor_us']:.1f})" for r in rows))


if __name__ == "__main__":
    main()
