"""Where a step's time goes, by torch's profiler and by samples of the host.

    python -m benchmarks.cuda_profile --out profile.json      (MPS must run; py-spy on the PATH for the host's samples)
    python -m benchmarks.cuda_profile --growth prefill --out growth-profile.json --standbys 3 --hot-standbys 3

Qwen3-30B-A3B's shape as in `cuda_scaling`. Decode steps of one rank of two beside plain SGLang: for each server and
batch size microseconds of a step, kernels of a step by name, calls of the CUDA runtime, and, sampled without stopping
the process, the share of the scheduler's main thread by function. The traces themselves are kept beside the JSON.

With --growth: that of rank 0 at 1, 2 and 4 ranks of one server under a closed loop of `cuda_scaling`'s section growth.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.cuda_scaling import LOADS, closed_loop, command_line, rate, scheduler_of, sizes_up_to, start_servers
from benchmarks.cuda_server import Device, Servers, add_options, resize, standbys, status_of
from benchmarks.scaling.machine import describe
from benchmarks.scaling.servers import Instance

SERVERS = ("elastic-1-of-2", "plain")
_HOST_S = 4.0
_SAMPLES_HZ = 500


async def trace(instance: Instance, batch: int, steps: int, folder: Path) -> dict[str, Any]:
    """Profile `steps` decode steps of `batch` requests and read the trace."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {"output_dir": str(folder), "num_steps": steps, "activities": ["CPU", "GPU"], "with_stack": False}
    async with aiohttp.ClientSession(instance.url, timeout=aiohttp.ClientTimeout(total=120)) as session:
        running = asyncio.ensure_future(rate(session, batch, 600, 900 + batch))
        await asyncio.sleep(0.5)
        async with session.post("/start_profile", json=body) as response:
            response.raise_for_status()
        await running
    deadline = time.monotonic() + 30
    while not (found := sorted(folder.glob("*.trace.json.gz"))):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no trace in {folder}: {os.listdir(folder)}")
        await asyncio.sleep(0.2)
    await asyncio.sleep(1.0)  # it may still be written
    return read(found[0], steps)


def read(path: Path, steps: int) -> dict[str, Any]:
    """Kernels, their sum and the host's calls of one trace; microseconds and counts of one step."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    kernels: dict[str, list[float]] = collections.defaultdict(list)
    calls: dict[str, list[float]] = collections.defaultdict(list)
    spans = []
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernels[short(name)].append(event["dur"])
            spans.append((event["ts"], event["ts"] + event["dur"]))
        elif kind in ("cuda_runtime", "cuda_driver"):
            calls[name].append(event["dur"])
    return {
        "trace": path.name,
        "step_us": round((max(e for _, e in spans) - min(s for s, _ in spans)) / steps, 1) if spans else None,
        "gpu_busy_us": round(covered(spans) / steps, 1),
        "kernels_a_step": round(sum(map(len, kernels.values())) / steps, 1),
        "kernels": by_time(kernels, steps),
        "calls": by_time(calls, steps),
    }


def short(name: str) -> str:
    return re.sub(r"<.*|\(.*", "", name.removeprefix("void "))[:70]


def by_time(found: dict[str, list[float]], steps: int) -> list[tuple[str, float, float]]:
    """(name, times a step, microseconds a step), longest first."""
    rows = [(name, round(len(each) / steps, 2), round(sum(each) / steps, 1)) for name, each in found.items()]
    return sorted(rows, key=lambda row: -row[2])[:60]


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for since, until in sorted(spans):
        total += max(0.0, until - max(since, end))
        end = max(end, until)
    return total


async def host(instance: Instance, batch: int, folder: Path) -> dict[str, Any]:
    """Samples of the scheduler's main thread while `batch` requests decode: share of time in and below functions."""
    async with aiohttp.ClientSession(instance.url, timeout=aiohttp.ClientTimeout(total=120)) as session:
        running = asyncio.ensure_future(rate(session, batch, 3500 if batch == 1 else 1200, 700 + batch))
        await asyncio.sleep(0.4)
        found = await samples(scheduler_of(instance).pid, folder)
        await running
    return found


async def samples(pid: int, folder: Path) -> dict[str, Any]:
    """Of a scheduler's main thread, for some seconds from now: percent of the time in and below each function."""
    if shutil.which("py-spy") is None:
        return {"error": "py-spy is not on the PATH"}
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "host.txt"
    spy = ["py-spy", "record", "--nonblocking", "-r", str(_SAMPLES_HZ), "-d", str(int(_HOST_S)), "-f", "raw"]
    done = await asyncio.to_thread(
        subprocess.run, [*spy, "-o", str(out), "-p", str(pid)], capture_output=True, text=True, timeout=60
    )
    if not out.exists():
        return {"error": done.stderr[-800:]}
    within: collections.Counter[str] = collections.Counter()
    total = 0
    for line in out.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [re.sub(r":\d+\)", ")", frame) for frame in stack.split(";")]
        if not any("event_loop" in frame for frame in frames):
            continue
        total += int(count)
        within.update(dict.fromkeys(frames, int(count)))
    return {
        "samples": total,
        "percent_within": {name: round(100 * count / max(total, 1), 1) for name, count in within.most_common(110)},
    }


async def growing(servers: Servers, settings: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Rank 0's main thread at each size, in the middle of a closed loop."""
    instance = await servers.get("elastic")
    for size in sizes_up_to(settings.ranks):
        await resize(instance, size, settings)
        await standbys(instance, min(settings.hot_standbys, settings.ranks - size), settings)
        pid = next(rank["pid"] for rank in (await status_of(instance))["ranks"] if rank["rank"] == 0)
        for name in settings.growth:
            running = asyncio.ensure_future(
                closed_loop(instance, LOADS[name], settings.growth_rounds, size * 1_000_003)
            )
            await asyncio.sleep(1.5)
            found = await samples(pid, settings.out.parent / f"growth-{name}-{size}")
            rows.append({"ranks": size, "load": name, **await running, "host": found})
            print(size, name, rows[-1]["prompt_tokens_per_s"], rows[-1]["tokens_per_s"], flush=True)


async def run(settings: argparse.Namespace) -> dict[str, Any]:
    device = Device()
    result: dict[str, Any] = {
        "device": device.name,
        "machine": describe(),
        "command": f"python -m benchmarks.cuda_profile {command_line()}",
        "rows": [],
    }
    async with AsyncExitStack() as stack:
        servers = Servers(stack, settings)
        start_servers(servers, settings, settings.logs)
        await servers.settled()
        if settings.growth:
            try:
                await growing(servers, settings, result["rows"])
            finally:
                settings.out.write_text(json.dumps(result, indent=1) + "\n")
            return result
        for batch in settings.batches:
            for name in SERVERS:
                instance = await servers.get(name)
                async with aiohttp.ClientSession(instance.url, timeout=aiohttp.ClientTimeout(total=120)) as session:
                    rates = [await rate(session, batch, 256, 40 + number) for number in range(4)][1:]
                row: dict[str, Any] = {"server": name, "batch": batch, "tokens_per_s": [round(r, 1) for r in rates]}
                result["rows"].append(row)
                for what, measure in (("device", trace), ("host", host)):
                    where = settings.out.parent / f"{name}-{batch}-{what}"
                    try:
                        if what == "device":
                            row[what] = await trace(instance, batch, settings.steps, where)
                        else:
                            row[what] = await host(instance, batch, where)
                    except (RuntimeError, OSError, aiohttp.ClientError, subprocess.SubprocessError) as error:
                        row[what] = {"error": f"{measure.__name__}: {error}"[-600:]}
                    settings.out.write_text(json.dumps(result, indent=1) + "\n")
                print(name, batch, row["tokens_per_s"], row["device"].get("step_us"), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_profile", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, default=Path("/tmp/cuda-profile-logs"))
    add_options(parser)
    parser.add_argument("--batches", type=lambda text: list(map(int, text.split(","))), default=[1, 16])
    parser.add_argument("--steps", type=int, default=20, help="of each trace")
    parser.add_argument(
        "--growth", type=lambda text: text.split(","), help=f"loads under which one server grows: {', '.join(LOADS)}"
    )
    parser.add_argument("--growth-rounds", type=int, default=8, help="requests of each lane of that load")
    parser.set_defaults(standbys=0, start=1, section_s=120.0)
    settings = parser.parse_args()
    settings.sections = ["growth" if settings.growth else "static"]
    settings.logs.mkdir(parents=True, exist_ok=True)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    result = asyncio.run(run(settings))
    return int(any("error" in row.get(what, {}) for row in result["rows"] for what in ("device", "host")))


if __name__ == "__main__":
    sys.exit(main())
