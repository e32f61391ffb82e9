"""On NVIDIA GPUs: the cost of a change of size, and the cost of elasticity while nothing changes.

    python -m benchmarks.cuda_scaling --out benchmarks/results/cuda-scaling-h200.json      (MPS must run: gpu_all.sh)

A public model's shape with `--layers` layers and dummy weights by seed, several ranks on one GPU. All servers start at
once, since starting takes most of the time; then the sections measure one after the other. A section that fails or
exceeds its limit is recorded as such, and the others continue; the JSON is written every few seconds.

- changes: 1 -> 2 -> 4 -> 2 -> 1 repeatedly while streams decode; with `--ranks 8` to eight and back.
- growth: throughput and TTFT at 1, 2 and 4 ranks (8) of one server, closed loop, each rank with its share of the GPU;
  with `--start N` of one that starts with N ranks, at that size only.
- static: tokens/s of one rank against plain SGLang without the plugin, batch 1, 16, 64.
- capacity: tokens/s of 2 ranks of 8 against 2 of 2, and each rank's share of memory.
- deaths: workers and the HMM are killed while two or four ranks decode; how long streams stop, and whether any is lost.
- storm: random changes, every other one with a random process killed meanwhile.
- tokens: float32 tiny model of the same architecture: tokens through changes equal those without a change.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import statistics
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.cuda_faults import deaths, storm
from benchmarks.cuda_server import (
    Device,
    Servers,
    add_options,
    fresh,
    ids,
    mixed_load,
    must_scale,
    outcome,
    processes_of,
    resize,
    standbys,
    streaming,
    write_shape,
)
from benchmarks.scaling.machine import describe
from benchmarks.scaling.servers import Instance
from benchmarks.streams import Ask, Load, unequal
from elasticmoe_sglang.tiny_model import Arch, make_tiny_model

TOKENS_SIZES = (2, 4, 2, 1)
"""Of section tokens, from 1 on."""
BATCHES = (1, 16, 64)
LOADS = {"prefill": (32, 1000, 8), "mixed": (64, 500, 64), "decode": (64, 32, 200)}
"""Closed loops of section growth: requests at a time, prompt tokens, output tokens of each."""
STREAMED = 4
"""Every so many lanes of a closed loop one whose answers are streamed."""
ARCHITECTURES: dict[str, Arch] = {"qwen3-30b-a3b": "qwen3_moe", "deepseek-v2-lite": "deepseek_v2"}
"""Of section tokens' tiny model, by --model."""
_AROUND_S = 0.3
_WRITTEN_S = 5.0
_CONTROL_S = 0.2
GAP_BEYOND_S = 0.02
FIRST_USE = re.compile(r"rank (\d+): a kernel was loaded while serving: (.*)")


async def rate(session: aiohttp.ClientSession, batch: int, tokens: int, number: int) -> float:
    """Tokens a second of `batch` requests that start together, whole answers; `number` makes their prompts."""
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": [ids(number * batch + i) for i in range(batch)], "sampling_params": sampling}
    started = time.monotonic()
    async with session.post("/generate", json=body) as response:
        answers = await response.json()
    seconds = time.monotonic() - started
    count = sum(len(answer["output_ids"]) for answer in answers)
    assert count == batch * tokens, f"{count} tokens, not {batch * tokens}"
    return count / seconds


def scheduler_of(instance: Instance) -> psutil.Process:
    """The process of the server's only active rank: the scheduler that has used most processor time."""
    found = [process for process in processes_of(instance) if "scheduler" in " ".join(process.cmdline())]
    return max(found, key=lambda process: process.cpu_times().user)


def give_core(instances: Sequence[Instance]) -> int:
    """Each server's scheduling thread gets the same core, of which no other thread of theirs uses anything.

    Where it runs, and what runs on the core's other half, changes a decode step's host time by half. Returns the core.
    """
    core = max(os.sched_getaffinity(0))
    siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
    shared = {int(number) for part in siblings.strip().split(",") for number in part.split("-")} | {core}
    rest = os.sched_getaffinity(0) - shared
    for instance in instances:
        scheduler = scheduler_of(instance).pid
        for process in processes_of(instance):
            for thread in process.threads():
                os.sched_setaffinity(thread.id, {core} if thread.id == scheduler else rest)
    return core


@contextmanager
def suspended(instance: Instance) -> Iterator[None]:
    """The server's processes stand still: an idle SGLang polls."""
    processes = processes_of(instance)
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


async def compare(one: Instance, other: Instance, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Both in turn, round by round, as servers measured one after the other differ by more than what is looked for.

    The first round of each batch size warms up. The server that is not measured is suspended; a few tokens come first,
    as the other was suspended until now. The schedulers share a core in turn.
    """
    rows = []
    give_core([one, other])

    async def alone(instance: Instance, idle: Instance, batch: int, number: int) -> float:
        # A connection of its own: the server closes one that was idle while it was suspended.
        timeout = aiohttp.ClientTimeout(total=60)
        with suspended(idle):
            async with aiohttp.ClientSession(instance.url, timeout=timeout) as session:
                await rate(session, batch, 16, number)
                return await rate(session, batch, settings.tokens, number)

    for batch in BATCHES:
        pairs = [
            (await alone(one, other, batch, number), await alone(other, one, batch, number))
            for number in range(settings.rounds + 1)
        ][1:]
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        row = {
            "batch": batch,
            "first_tokens_per_s": [round(ours, 1) for ours, _ in pairs],
            "second_tokens_per_s": [round(theirs, 1) for _, theirs in pairs],
            "ratio": {
                "median": round(statistics.median(ratios), 3),
                "least": round(ratios[0], 3),
                "most": round(ratios[-1], 3),
            },
            "target": 0.98,
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def sizes_up_to(most: int) -> list[int]:
    """1, 2, 4, ..., `most`."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


async def change(instance: Instance, load: Load, size: int, device: Device) -> dict[str, Any]:
    await asyncio.sleep(1.0)  # a median gap and a rate at this size
    before = time.monotonic()
    started = time.monotonic()
    operation = await must_scale(instance, size)
    ended = time.monotonic()
    await asyncio.sleep(1.0)
    flow = {
        "before": tokens_between(load, before - 1.0, before),
        "during": tokens_between(load, started, ended),
        "after": tokens_between(load, ended, ended + 1.0),
    }
    steady = ((before - 1.0, before - 0.5), (time.monotonic() - 0.4, time.monotonic()))
    pauses = [pause for rank, pause in operation["pause_ms"].items() if int(rank) in operation["ranks_after"]]
    return {
        "from": operation["old_ep_size"],
        "to": operation["new_ep_size"],
        "seconds": round(ended - started, 3),
        "timings": operation["timings"],
        "pauses_ms": [round(pause, 2) for pause in pauses],
        **gaps_between(load, started, ended + _AROUND_S),
        "tokens_per_s": flow,
        "moved_requests": operation["moved_requests"],
        "columns_moved": operation["columns_moved"],
        "bytes_moved": operation["bytes_moved"],
        "peak_over_larger": round(device.peak(started, ended) / max(device.peak(*at) for at in steady), 4),
        "lost": len(load.lost),
    }


def gaps_between(load: Load, since: float, until: float) -> dict[str, Any]:
    """The longest gap of each stream that reaches into this time, against three times the stream's median and 20 ms."""
    gaps: list[float] = []
    late: list[float] = []
    for record in load.records:
        inside = [gap for at, gap in record.gaps() if at >= since and at - gap <= until]
        calm = [gap for at, gap in record.gaps() if at < since or at - gap > until]
        if inside and len(calm) >= 8:
            gaps.append(max(inside) * 1e3)
            late.append((max(inside) - 3 * statistics.median(calm) - GAP_BEYOND_S) * 1e3)
    return {
        "streams": len(gaps),
        "longest_gap_ms": round(max(gaps), 1) if gaps else None,
        "beyond_limit_ms": [round(beyond, 1) for beyond in sorted(late)],
    }


async def no_change(load: Load) -> dict[str, Any]:
    """The control: as long as a change and what is looked at around it, under the same load."""
    started = time.monotonic()
    await asyncio.sleep(_CONTROL_S)
    ended = time.monotonic()
    await asyncio.sleep(1.0)
    return gaps_between(load, started, ended + _AROUND_S)


def gaps_summary(part: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of changes, or of times without one: streams' longest gaps against their limit."""
    beyond = sorted(each for row in part for each in row["beyond_limit_ms"])
    longest = [row["longest_gap_ms"] for row in part if row["longest_gap_ms"] is not None]
    return {
        "n": len(part),
        "longest_gap_ms": {"median": statistics.median(longest), "most": max(longest)} if longest else None,
        "streams_within_gap_limit": round(sum(each <= 0 for each in beyond) / max(1, len(beyond)), 4),
        "beyond_limit_p99_ms": beyond[int(0.99 * (len(beyond) - 1))] if beyond else None,
    }


def tokens_between(load: Load, since: float, until: float) -> float:
    """Tokens per second that arrived in this time, over all streams."""
    count = sum(since <= at < until for record in load.records for at in record.arrivals)
    return round(count / max(until - since, 1e-3), 1)


async def changes(servers: Servers, settings: argparse.Namespace, record: dict[str, Any], device: Device) -> None:
    instance = await servers.get("elastic")
    load = mixed_load(instance, settings)
    up = sizes_up_to(settings.ranks)
    rows = record["rows"] = []
    calm = record["without_a_change"] = []
    try:
        async with streaming(load, settings.streams):
            for repetition, (before, size) in itertools.product(
                range(settings.repetitions), itertools.pairwise([*up, *reversed(up[:-1])])
            ):
                waited = await standbys(instance, size - before, settings)
                calm.append({"ranks": before} | await no_change(load))
                row = {"repetition": repetition, "waited_for_standbys_s": waited}
                rows.append(row | await change(instance, load, size, device))
                print(json.dumps(rows[-1]), flush=True)
    finally:
        record.update(outcome(load))
        record["first_uses"] = first_uses(instance)
        record["summary"] = summary_of(rows) | {"without a change": gaps_summary(calm)}


def summary_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Up and down apart: seconds, pauses, gaps, flow and memory, each against its target."""
    found: dict[str, dict[str, Any]] = {}
    for name, part in (
        ("up", [row for row in rows if row["to"] > row["from"]]),
        ("down", [row for row in rows if row["to"] < row["from"]]),
    ):
        if not part:
            continue
        pauses = [max(row["pauses_ms"]) for row in part if row["pauses_ms"]]
        flow = [row["tokens_per_s"]["during"] / row["tokens_per_s"]["before"] for row in part]
        found[name] = {
            **gaps_summary(part),
            "seconds": {
                "median": statistics.median(row["seconds"] for row in part),
                "most": max(row["seconds"] for row in part),
            },
            "pause_ms": {"median": statistics.median(pauses), "most": max(pauses)},
            "during_over_before": {"median": round(statistics.median(flow), 3), "least": round(min(flow), 3)},
            "peak_over_larger": max(row["peak_over_larger"] for row in part),
        }
    return found


def first_uses(instance: Instance) -> dict[str, dict[str, int]]:
    """Rank -> kernel -> how often its workers loaded it while they served."""
    found: dict[str, dict[str, int]] = {}
    for rank, kernel in FIRST_USE.findall(instance.log.read_text(errors="replace")):
        names = found.setdefault(rank, {})
        names[kernel] = names.get(kernel, 0) + 1
    return found


async def closed_loop(instance: Instance, load: tuple[int, int, int], rounds: int, seed: int) -> dict[str, Any]:
    """`rounds` requests a lane without a break, of which the first is not counted.

    Requests of equal length end together, so whole rounds are timed: from the end of the first to the end of the last.
    TTFT is that of the load's own requests, of every lane in `STREAMED`: requests beside them would make every other
    step one of prefill.
    """
    lanes, prompt, tokens = load
    done: list[float] = []
    first: list[float] = []
    numbers = itertools.count(seed)

    async def ask(session: aiohttp.ClientSession, streamed: bool, counted: bool) -> None:
        sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": fresh(next(numbers), prompt), "sampling_params": sampling, "stream": streamed}
        started = time.monotonic()
        last = b""
        async with session.post("/generate", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if streamed and counted and not last:
                    first.append(time.monotonic() - started)
                if line.strip() and not line.startswith(b"data: [DONE]"):
                    last = line
        count = json.loads(last.removeprefix(b"data:"))["meta_info"]["completion_tokens"]
        assert count == tokens, f"{count} tokens, not {tokens}"

    async def lane(session: aiohttp.ClientSession, number: int) -> None:
        for turn in range(rounds):
            await ask(session, streamed=number % STREAMED == 0, counted=turn > 0)
            done.append(time.monotonic())

    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(instance.url, connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(lane(session, number) for number in range(lanes)))
    started, ended = done[lanes - 1], done[-1]
    count = len(done) - lanes
    times = sorted(first)
    return {
        "requests": count,
        "seconds": round(ended - started, 2),
        "tokens_per_s": round(count * tokens / (ended - started), 1),
        "prompt_tokens_per_s": round(count * prompt / (ended - started), 1),
        "ttft_ms": {"n": len(times), "p50": _quantile(times, 0.5), "p99": _quantile(times, 0.99)},
    }


def _quantile(times: Sequence[float], share: float) -> float | None:
    """In milliseconds, of seconds in ascending order."""
    return round(times[min(len(times) - 1, int(share * len(times)))] * 1e3, 1) if times else None


async def growth(servers: Servers, settings: argparse.Namespace, record: dict[str, Any], device: Device) -> None:
    instance = await servers.get("elastic")
    record["loads"] = {
        name: dict(zip(("requests", "prompt", "output"), load, strict=True)) for name, load in LOADS.items()
    }
    rows = record["rows"] = []
    sizes = sizes_up_to(settings.ranks) if settings.start == 1 else [settings.start]
    for repetition in range(settings.growth_repetitions):
        for size in sizes:
            await resize(instance, size, settings)
            # None boots meanwhile.
            await standbys(instance, min(settings.hot_standbys, settings.ranks - size), settings)
            for index, (name, load) in enumerate(LOADS.items()):
                seed = ((repetition * 8 + size) * len(LOADS) + index) * 1_000_003
                found = await closed_loop(instance, load, settings.growth_rounds, seed)
                rows.append({"repetition": repetition, "ranks": size, "load": name, **found})
                print(json.dumps(rows[-1]), flush=True)
        await resize(instance, settings.start, settings)


async def static(servers: Servers, settings: argparse.Namespace, record: dict[str, Any], device: Device) -> None:
    record["what"] = "first: elastic, 1 rank of 2; second: plain SGLang without the plugin"
    record["rows"] = await compare(await servers.get("elastic-1-of-2"), await servers.get("plain"), settings)


async def capacity(servers: Servers, settings: argparse.Namespace, record: dict[str, Any], device: Device) -> None:
    record["what"] = "first: 2 ranks of 8; second: 2 of 2"
    record["rows"] = await compare(await servers.get("elastic-8"), await servers.get("elastic-2"), settings)


async def tokens(servers: Servers, settings: argparse.Namespace, record: dict[str, Any], device: Device) -> None:
    """Greedy streams at one size first, then the same through changes."""
    instance = await servers.get("tiny-4")
    asks = [Ask(key=str(i), prompt=ids(i, 8 + i), tokens=96) for i in range(8)]
    still = Load(instance.client, lambda lane, number: asks[0])
    await still.run_once(asks)
    moving = Load(instance.client, lambda lane, number: asks[lane % len(asks)])
    record["changes"] = rows = []
    async with streaming(moving, len(asks)):
        for before, size in itertools.pairwise((1, *TOKENS_SIZES)):
            await standbys(instance, size - before, settings)
            rows.append((await change(instance, moving, size, device))["to"])
    record["lost"] = [lost.failure for lost in (*still.lost, *moving.lost)]
    record["compared"] = len(moving.records)
    record["different"] = unequal([one for one in moving.records if not one.lost], still.records)


Section = Callable[[Servers, argparse.Namespace, dict[str, Any], Device], Awaitable[None]]
SECTIONS: dict[str, Section] = {
    "changes": changes,
    "growth": growth,
    "static": static,
    "capacity": capacity,
    "deaths": deaths,
    "storm": storm,
    "tokens": tokens,
}


def graph_sizes(settings: argparse.Namespace) -> list[int]:
    """Of captured decode steps. Section growth needs one for all its requests: a batch larger than any graph is
    computed without."""
    most = max(lanes for lanes, _, _ in LOADS.values()) if "growth" in settings.sections else 0
    return settings.graph_sizes if most <= max(settings.graph_sizes) else [*settings.graph_sizes, most]


def start_servers(servers: Servers, settings: argparse.Namespace, folder: Path) -> None:
    shape = str(write_shape(folder / "shape", settings.model, settings.layers))
    dummy = ["--model-path", shape, "--load-format", "dummy", "--skip-tokenizer-init"]
    graphs = ["--cuda-graph-bs-decode", *map(str, graph_sizes(settings))]
    whole = ["--multiprocessor-share", "all"]  # as the server beside which it is measured

    def elastic(
        name: str, first: int, ranks: int, ready: int, *args: str, env: Mapping[str, str] | None = None
    ) -> None:
        sizes = ["--ep-size", str(first), "--max-ep-size", str(ranks), "--ranks-per-device", str(ranks)]
        servers.start(name, [*sizes, "--standbys", str(max(ready, first)), *args], env=env)

    if {"changes", "growth", "deaths", "storm"} & set(settings.sections):
        hot = ["--hot-standbys", str(settings.hot_standbys)]
        elastic("elastic", settings.start, settings.ranks, settings.standbys, *dummy, *graphs, *hot)
    if "static" in settings.sections:
        elastic("elastic-1-of-2", 1, 2, 0, *dummy, *graphs, *whole)
        servers.start("plain", [*dummy, *graphs], plain=True)
    if "capacity" in settings.sections:
        elastic("elastic-8", 2, 8, 0, *dummy, *graphs, *whole)
        elastic("elastic-2", 2, 2, 0, *dummy, *graphs, *whole)
    if "tokens" in settings.sections:
        tiny = str(make_tiny_model(folder / "tiny", arch=ARCHITECTURES[settings.model]))
        flags = ["--model-path", tiny, "--dtype", "float32", "--skip-tokenizer-init"]
        # SGLang's own fused operators take no float32, and those that stand in for them cannot be captured.
        flags += ["--disable-cuda-graph"]
        hot = ["--hot-standbys", str(settings.hot_standbys)]
        elastic("tiny-4", 1, 4, 3, *flags, *hot, env={"SGLANG_FORCE_FUSED_OP_BACKEND": "torch"})


def command_line() -> str:
    """The arguments, without where the results go."""
    places = {index + offset for index, word in enumerate(sys.argv) if word in ("--out", "--logs") for offset in (0, 1)}
    return " ".join(word for index, word in enumerate(sys.argv) if index > 0 and index not in places)


async def run(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    device = Device()
    result: dict[str, Any] = {
        "device": device.name,
        "machine": describe(),
        "command": f"python -m benchmarks.cuda_scaling {command_line()}",
        "settings": {name: value for name, value in vars(settings).items() if not isinstance(value, Path)},
        "boot_s": {},
        "sections": {},
    }
    async with AsyncExitStack() as stack:
        servers = Servers(stack, settings)
        result["boot_s"] = servers.boots
        start_servers(servers, settings, folder)
        if not settings.impatient:
            await servers.settled()
        writing = asyncio.ensure_future(keep_written(result, settings.out))
        stack.callback(writing.cancel)
        for name in settings.sections:
            record = result["sections"][name] = {}
            started = time.monotonic()
            try:
                await asyncio.wait_for(SECTIONS[name](servers, settings, record, device), settings.section_s)
            except (Exception, asyncio.TimeoutError) as error:
                record["error"] = f"{type(error).__name__}: {error}"[-2500:]
                traceback.print_exc()
            record["seconds"] = round(time.monotonic() - started, 1)
            write(result, settings.out)
            print(f"{name}: {record.get('error', 'measured')} after {record['seconds']} s", flush=True)
    return result


def write(result: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


async def keep_written(result: dict[str, Any], path: Path) -> None:
    """What has been measured is in the file when this process is ended before its time."""
    while True:
        write(result, path)
        await asyncio.sleep(_WRITTEN_S)


def show(result: dict[str, Any]) -> None:
    for row in result["sections"].get("changes", {}).get("rows", []):
        flow, pauses = row["tokens_per_s"], max(row["pauses_ms"], default=0)
        print(
            f"{row['from']} -> {row['to']}: {row['seconds']:6.2f} s, pause {pauses:6.1f} ms, longest gap "
            f"{row['longest_gap_ms']} ms, tokens/s {flow['before']} / {flow['during']} / {flow['after']}, "
            f"peak x {row['peak_over_larger']}"
        )
    for name, summary in result["sections"].get("changes", {}).get("summary", {}).items():
        print(name, json.dumps(summary))
    for name in ("static", "capacity"):
        for row in result["sections"].get(name, {}).get("rows", []):
            ours, theirs = (statistics.median(row[f"{which}_tokens_per_s"]) for which in ("first", "second"))
            print(f"{name}, batch {row['batch']}: {ours} / {theirs} tokens/s, ratio {row['ratio']}")
    for row in result["sections"].get("deaths", {}).get("rows", []):
        print(
            f"{row['killed']} killed: whole after {row['whole_s']:.2f} s with ranks {row['ranks_after']}, longest gap "
            f"{row['longest_gap_ms']} ms, lost {row['lost']}"
        )
    print("start, s:", result["boot_s"])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda_scaling", description=(__doc__ or "").split(":")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, default=Path("/tmp/cuda-scaling-logs"))
    add_options(parser)
    parser.add_argument("--sections", type=lambda text: text.split(","), default=list(SECTIONS))
    parser.add_argument("--repetitions", type=int, default=5, help="of section changes")
    parser.add_argument("--growth-repetitions", type=int, default=3, help="of all sizes")
    parser.add_argument("--growth-rounds", type=int, default=4, help="requests of each lane of a closed loop")
    parser.add_argument("--start", type=int, default=1, help="ranks that the server starts with (growth)")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--stream-tokens", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=128, help="of each request in static and capacity")
    parser.add_argument("--rounds", type=int, default=7, help="of each batch in static and capacity")
    parser.add_argument("--storm", type=int, default=50, help="random changes in section storm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--section-s", type=float, default=240.0)
    parser.add_argument("--impatient", action="store_true", help="measure while other servers still start")
    settings = parser.parse_args()
    settings.logs.mkdir(parents=True, exist_ok=True)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    result = asyncio.run(run(settings, settings.logs))
    show(result)
    return int(any("error" in record for record in result["sections"].values()))


if __name__ == "__main__":
    sys.exit(main())
