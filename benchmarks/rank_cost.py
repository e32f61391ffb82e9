"""What a rank costs beside plain SGLang on the CPU, and how much two ranks could reach on this machine at all.

    python -m benchmarks.rank_cost --out benchmarks/results/rank-cost.json [--py-spy PATH]

- alone: plain SGLang and one active rank of two, in turn, 1 and 8 requests at a time; tokens/s and their ratios.
- ceiling: requests/s of a closed loop: plain SGLang at one rank; two such servers that exchange nothing, a core each;
  plain SGLang at two ranks (gloo); this project's at two.
- shares, with py-spy: where the schedulers of the last two spend their time. The sampler's pauses are in it.

Servers that are not measured are suspended: an idle SGLang polls.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.cuda_server import processes_of
from benchmarks.scaling.machine import describe
from benchmarks.scaling.servers import Instance, ServerSettings
from elasticmoe_sglang.cpu_bind import usable_cores
from elasticmoe_sglang.tiny_model import make_tiny_model

KV_TOKENS = 16384
LANES, PROMPT, OUTPUT = 16, 200, 36
"""Of the closed loop."""
ALONE_TOKENS = 160
_WARM_S = 2.0
_SPY_S = 12
_SPY_OPTIONS = ("--duration", str(_SPY_S), "--rate", "100", "--idle", "--format", "raw")
_COLLECTIVES = ("gloo", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier")


@contextmanager
def running(instances: Sequence[Instance]) -> Iterator[None]:
    """Only in here do these servers run."""
    for process in (each for instance in instances for each in processes_of(instance)):
        process.resume()
    try:
        yield
    finally:
        for process in (each for instance in instances for each in processes_of(instance)):
            process.suspend()


async def generate(session: aiohttp.ClientSession, number: int, prompt: int, tokens: int) -> None:
    ids = [(7 * number + place * (1 + number % 5)) % 1000 + 5 for place in range(prompt)]
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    async with session.post("/generate", json={"input_ids": ids, "sampling_params": sampling}) as response:
        answer = await response.json()
    assert len(answer["output_ids"]) == tokens


async def rate(instance: Instance, lanes: int, tokens: int, number: int) -> float:
    """Tokens/s of requests that start together."""
    async with aiohttp.ClientSession(instance.url) as session:
        started = time.monotonic()
        await asyncio.gather(*(generate(session, 1000 * number + lane, 16, tokens) for lane in range(lanes)))
        return lanes * tokens / (time.monotonic() - started)


async def closed_loop(instances: Sequence[Instance], seconds: float, number: int) -> float:
    """Requests/s that end within so many seconds, lanes spread over the servers."""
    ended = 0
    until = time.monotonic() + seconds

    async def lane(place: int) -> None:
        nonlocal ended
        async with aiohttp.ClientSession(instances[place % len(instances)].url) as session:
            count = 0
            while time.monotonic() < until:
                await generate(session, 100_000 * number + 1000 * place + count, PROMPT, OUTPUT)
                count += 1
                ended += time.monotonic() < until

    await asyncio.gather(*(lane(place) for place in range(LANES)))
    return ended / seconds


async def alone(servers: dict[str, Instance], repetitions: int) -> list[dict[str, Any]]:
    rows = []
    for lanes in (1, 8):
        found: dict[str, list[float]] = {"plain": [], "one of two": []}
        for number in range(repetitions):
            for name, rates in found.items():
                with running([servers[name]]):
                    await rate(servers[name], lanes, 16, 500 + number)
                    rates.append(round(await rate(servers[name], lanes, ALONE_TOKENS, number), 1))
        ratios = sorted(ours / theirs for theirs, ours in zip(found["plain"], found["one of two"], strict=True))
        row = {"at_a_time": lanes, "tokens_per_s": found, "ratio": spread(ratios)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


async def ceiling(servers: dict[str, Instance], repetitions: int, seconds: float) -> dict[str, dict[str, Any]]:
    arms = {
        "plain": ["plain wide"],
        "two plain servers, a core each": ["first core", "second core"],
        "plain 2 (gloo)": ["gloo"],
        "elastic 2": ["two of two"],
    }
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(repetitions):
        for name, members in arms.items():
            wanted = [servers[member] for member in members]
            with running(wanted):
                await closed_loop(wanted, _WARM_S, 90 + number)
                found[name].append(round(await closed_loop(wanted, seconds, number), 2))
        print(json.dumps({name: rates[-1] for name, rates in found.items()}), flush=True)
    return {name: {"requests_per_s": rates, **spread(rates)} for name, rates in found.items()}


async def shares(servers: dict[str, Instance], spy: Path, folder: Path) -> dict[str, list[dict[str, float]]]:
    found = {}
    for name in ("gloo", "two of two"):
        with running([servers[name]]):
            schedulers = [each for each in processes_of(servers[name]) if "scheduler" in " ".join(each.cmdline())]
            files = [folder / f"{name}-{each.pid}.raw" for each in schedulers]
            recorders = [
                subprocess.Popen(
                    [str(spy), "record", "--pid", str(each.pid), *_SPY_OPTIONS, "--output", str(file)],
                    stderr=subprocess.DEVNULL,
                )
                for each, file in zip(schedulers, files, strict=True)
            ]
            await closed_loop([servers[name]], _SPY_S + 1, 7)
            for recorder in recorders:
                recorder.wait()
        found[name] = [share(file.read_text().splitlines()) for file in files]
    return found


def share(stacks: Sequence[str]) -> dict[str, float]:
    """Shares of the samples of the scheduler's own thread, of py-spy's raw lines `frame;frame;... count`."""
    counts: Counter[str] = Counter()
    for line in stacks:
        stack, _, count = line.rpartition(" ")
        if "event_loop" in stack:
            in_collective = any(word in stack for word in _COLLECTIVES)
            part = "collectives" if in_collective else "forward" if "forward_batch_generation" in stack else "rest"
            counts[part] += int(count)
    total = sum(counts.values())
    return {part: round(count / total, 3) for part, count in sorted(counts.items())}


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "n": len(values),
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def make(name: str, args: list[str], logs: Path, *, plain: bool, enter: Callable[[], None]) -> Instance:
    log = logs / f"{name.replace(' ', '-')}.log"
    return Instance(args, plain=plain, generation=0, size=1, log=log, start_timeout_s=300, env={}, enter=enter)


def bound_to(core: int) -> Callable[[], None]:
    return lambda: os.sched_setaffinity(0, {core})


async def run(settings: argparse.Namespace, folder: Path) -> dict[str, Any]:
    small, wide = (
        ServerSettings(
            model=str(make_tiny_model(folder / f"model-{hidden}", arch="qwen3_moe", hidden=hidden)),
            device="cpu",
            kv_tokens=KV_TOKENS,
            log_dir=folder,
        )
        for hidden in (256, 512)
    )
    cores = usable_cores()
    anywhere: Callable[[], None] = lambda: None  # noqa: E731
    wanted = {
        "plain": (small.plain(1, KV_TOKENS), True, anywhere),
        "one of two": (small.elastic(1, 2), False, anywhere),
        "plain wide": (wide.plain(1, KV_TOKENS), True, anywhere),
        "first core": (wide.plain(1, KV_TOKENS), True, bound_to(cores[0])),
        "second core": (wide.plain(1, KV_TOKENS), True, bound_to(cores[1])),
        "gloo": (wide.plain(2, KV_TOKENS), True, anywhere),
        "two of two": (wide.elastic(2, 2), False, anywhere),
    }
    flags = f"--repetitions {settings.repetitions} --seconds {settings.seconds:g}"
    flags += "" if settings.py_spy is None else " --py-spy"  # wherever it is
    result: dict[str, Any] = {"machine": describe(), "command": f"python -m benchmarks.rank_cost {flags}"}
    async with AsyncExitStack() as stack:
        servers = {}
        for name, (args, plain, enter) in wanted.items():
            servers[name] = await stack.enter_async_context(make(name, args, folder, plain=plain, enter=enter))
            for process in processes_of(servers[name]):
                process.suspend()
        try:
            result["alone"] = await alone(servers, settings.repetitions)
            result["ceiling"] = await ceiling(servers, settings.repetitions, settings.seconds)
            if settings.py_spy is not None:
                result["shares"] = await shares(servers, settings.py_spy, folder)
        finally:
            for process in (each for server in servers.values() for each in processes_of(server)):
                process.resume()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each closed loop")
    parser.add_argument("--py-spy", type=Path, help="the program, for the shares")
    settings = parser.parse_args()
    if len(usable_cores()) < 2:
        parser.error("two cores are needed")
    with tempfile.TemporaryDirectory(prefix="rank-cost-") as folder:
        result = asyncio.run(run(settings, Path(folder)))
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({"ceiling": result["ceiling"], "shares": result.get("shares")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
