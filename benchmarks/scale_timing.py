"""How long a change of size is noticeable, on the CPU with a tiny model (`python -m benchmarks.scale_timing`).

Two measurements, written to benchmarks/results/scale-timing-cpu.json together with the targets:

1. Changes by one rank, up from a warm standby and down, repeated while streams decode: the pause of each
   surviving rank at the commit, the time of the whole operation, and the longest gap of each stream during it.
2. Tokens per second at a fixed size of two, against plain SGLang with gloo at the same size, on the same model. The
   bound for any collective is measured too: one rank alone with half of the streams, counted twice.

Exit status 1 when a target was missed; the targets are for an otherwise idle machine with two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.scaling.servers import Instance, ServerSettings
from benchmarks.streams import Ask, Load, StreamRecord, unequal
from elasticmoe_sglang.tiny_model import make_tiny_model

OUT = Path(__file__).parent / "results" / "scale-timing-cpu.json"
SIZES = (3, 2, 1, 2)
"""From two ranks: up and down by one rank, so that one warm standby is enough for each way up."""
_AROUND_S = 0.3
_WORDS = ("def", "class", "return", "import", "for", "self", "value", "name", "in", "range", "print", "with", "open")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change under load, milliseconds.

    pauses_ms: of each surviving rank (see `PauseMeter`).
    gap_ms, gap_limit_ms: of the stream that came closest to, or furthest beyond, three times its median gap + 100 ms.
    """

    before: int
    after: int
    total_ms: float
    preparing_ms: float
    committing_ms: float
    pauses_ms: list[float]
    gap_ms: float
    gap_limit_ms: float
    streams: int
    moved_requests: int

    @property
    def up(self) -> bool:
        return self.after > self.before


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Tokens per second of one server at a fixed size, of all streams together; `rounds` one by one."""

    name: str
    tokens_per_s: float
    rounds: list[float]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A figure and its limit. `at_least` False: the value must not be larger."""

    name: str
    value: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def asks(count: int, tokens: int, seed: int) -> list[Ask]:
    rng = random.Random(seed)
    prompts = [" ".join(rng.choices(_WORDS, k=rng.randint(4, 24))) for _ in range(count)]
    return [Ask(key=str(number), prompt=prompt, tokens=tokens) for number, prompt in enumerate(prompts)]


async def measure_changes(instance: Instance, settings: argparse.Namespace) -> list[Change]:
    prompts = asks(64, settings.tokens, seed=1)
    load = Load(instance.client, lambda lane, number: prompts[(lane * 7 + number) % len(prompts)])
    lanes = asyncio.ensure_future(load.run(settings.streams))
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(instance.url, timeout=timeout) as session:
        for size in SIZES:  # the first join imports what later ones find imported, so it is not measured
            await one_change(session, load, size)
        changes = [await one_change(session, load, size) for _ in range(settings.repetitions) for size in SIZES]
    load.stop()
    await lanes
    if load.lost:
        raise SystemExit(f"{len(load.lost)} requests were lost: {load.lost[0].failure}")
    return changes


async def one_change(session: aiohttp.ClientSession, load: Load, size: int) -> Change:
    await wait_for_standby(session)
    await asyncio.sleep(1.0)  # a median gap at this size
    started = time.monotonic()
    async with session.post("/scale_elastic_ep", json={"new_ep_size": size, "wait": True}) as response:
        operation = await response.json()
    ended = time.monotonic()
    await asyncio.sleep(_AROUND_S)
    if operation.get("phase") != "done":
        raise SystemExit(f"the change to {size} ended as {operation}")
    gaps = [gap for record in load.records if (gap := worst_gap(record, started, ended + _AROUND_S)) is not None]
    worst = max(gaps, key=lambda pair: pair[0] / pair[1])
    staying = set(operation["ranks_before"]) & set(operation["ranks_after"])
    timings = operation["timings"]
    return Change(
        before=operation["old_ep_size"],
        after=operation["new_ep_size"],
        total_ms=timings["total_ms"],
        preparing_ms=timings["preparing_ms"],
        committing_ms=timings["committing_ms"],
        pauses_ms=[operation["pause_ms"][str(rank)] for rank in sorted(staying)],
        gap_ms=worst[0] * 1e3,
        gap_limit_ms=worst[1] * 1e3,
        streams=len(gaps),
        moved_requests=operation["moved_requests"],
    )


async def wait_for_standby(session: aiohttp.ClientSession) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        async with session.get("/elastic_ep/status") as response:
            status = await response.json()
        if any(rank["state"] == "standby" for rank in status["ranks"]):
            return
        await asyncio.sleep(0.1)
    raise SystemExit("no standby within 60 s")


def worst_gap(record: StreamRecord, since: float, until: float) -> tuple[float, float] | None:
    """The longest gap of a stream that ends in [since, until], with its limit; None if it did not run all that time."""
    gaps = record.gaps()
    inside = [gap for at, gap in gaps if at >= since and at - gap <= until]
    if len(gaps) < 8 or not inside:
        return None
    return max(inside), 3 * statistics.median(gap for _, gap in gaps) + 0.1


async def measure_rate(
    instance: Instance, name: str, settings: argparse.Namespace, *, share: int = 1
) -> tuple[Rate, list[StreamRecord]]:
    """Tokens per second; with `share` n, an n-th of the streams runs and counts n times."""
    rounds, records = [], []
    for number in range(settings.rounds + 1):
        load = Load(instance.client, lambda lane, number: Ask(key="", prompt="", tokens=1))
        started = time.monotonic()
        await load.run_once(asks(settings.streams // share, settings.tokens, seed=2))
        seconds = time.monotonic() - started
        if load.lost:
            raise SystemExit(f"{name}: {load.lost[0].failure}")
        if number:  # the first one warms up
            rounds.append(share * sum(len(record.token_ids) for record in load.records) / seconds)
        records = load.records
    return Rate(name=name, tokens_per_s=statistics.median(rounds), rounds=rounds), records


async def run(settings: argparse.Namespace, folder: Path, console: Console) -> tuple[list[Change], list[Rate]]:
    model = make_tiny_model(folder / "model", arch=settings.arch)
    servers = ServerSettings(model=str(model), device="cpu", kv_tokens=8192, log_dir=folder)

    def start(name: str, args: Sequence[str], *, plain: bool) -> Instance:
        console.print(f"starting: {name}")
        log = folder / f"{re.sub('[^a-z0-9]+', '-', name)}.log"
        return Instance(args, plain=plain, generation=0, size=2, log=log)

    rates, answers = [], []
    sizes = {"plain SGLang, gloo": None, "elastic, 2 of 2 ranks": 2, "elastic, 2 of 4 ranks": 4}
    changes: list[Change] = []
    for name, capacity in sizes.items():
        args = servers.plain(2, servers.kv_tokens) if capacity is None else servers.elastic(2, capacity)
        async with start(name, args, plain=capacity is None) as instance:
            rate, records = await measure_rate(instance, name, settings)
            rates.append(rate)
            answers.append(records)
            console.print(f"{name}: {rate.tokens_per_s:.0f} tokens/s")
            if capacity == 4:
                changes = await measure_changes(instance, settings)
    name = "no collectives: 1 rank, half of the streams, twice"
    async with start(name, servers.elastic(1, 2), plain=False) as instance:
        rates.append((await measure_rate(instance, name, settings, share=2))[0])
        console.print(f"{name}: {rates[-1].tokens_per_s:.0f} tokens/s")
    for records in answers[1:]:
        if different := unequal(records, answers[0]):
            raise SystemExit(f"tokens differ from plain SGLang's: {different[0]}")
    return changes, rates


def targets(changes: Sequence[Change], rates: Sequence[Rate]) -> list[Target]:
    def seconds(up: bool) -> float:
        return statistics.median(change.total_ms for change in changes if change.up is up) / 1e3

    gloo, elastic, roomy, _ = (rate.tokens_per_s for rate in rates)
    excess = max(change.gap_ms - change.gap_limit_ms for change in changes)
    pauses = [pause for change in changes for pause in change.pauses_ms]
    return [
        Target(name="commit pause, median of all ranks", value=statistics.median(pauses), limit=10, unit="ms"),
        Target(name="longest gap beyond 3 x median + 100 ms", value=excess, limit=0, unit="ms"),
        Target(name="one rank up from a warm standby, median", value=seconds(True), limit=2, unit="s"),
        Target(name="one rank down, median", value=seconds(False), limit=1, unit="s"),
        Target(name="tokens/s against gloo, 2 of 2 ranks", value=elastic / gloo, limit=3, unit="x", at_least=True),
        Target(name="tokens/s against gloo, 2 of 4 ranks", value=roomy / gloo, limit=3, unit="x", at_least=True),
    ]


def show(console: Console, changes: Sequence[Change], rates: Sequence[Rate], goals: Sequence[Target]) -> None:
    table = Table(
        "change", "total", "preparing", "committing", "pauses", "longest gap", "its limit", title="Milliseconds"
    )
    for change in changes:
        pauses = " ".join(f"{pause:.1f}" for pause in change.pauses_ms)
        figures = (change.total_ms, change.preparing_ms, change.committing_ms)
        rest = (pauses, f"{change.gap_ms:.0f}", f"{change.gap_limit_ms:.0f}")
        table.add_row(f"{change.before} -> {change.after}", *(f"{figure:.0f}" for figure in figures), *rest)
    console.print(table)
    table = Table("figure", "measured", "target", "met")
    for rate in rates:
        table.add_row(rate.name, f"{rate.tokens_per_s:.0f} tokens/s", "", "")
    for goal in goals:
        sign = ">=" if goal.at_least else "<="
        met = "yes" if goal.met else "[bold]no[/bold]"
        table.add_row(goal.name, f"{goal.value:.2f} {goal.unit}", f"{sign} {goal.limit:g} {goal.unit}", met)
    console.print(table)


def machine() -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "other_load": round(os.getloadavg()[0], 2),
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale_timing", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--arch", choices=("qwen3_moe", "deepseek_v2"), default="qwen3_moe")
    parser.add_argument("--streams", type=int, default=6, help="that decode at the same time")
    parser.add_argument("--tokens", type=int, default=160, help="of each stream")
    parser.add_argument("--repetitions", type=int, default=5, help="of 2 -> 3 -> 2 -> 1 -> 2")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement of tokens/s; the median counts")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 0 when every target was met."""
    settings = parse(argv)
    console = Console()
    before = machine()
    with tempfile.TemporaryDirectory(prefix="scale-timing-") as folder:
        changes, rates = asyncio.run(run(settings, Path(folder), console))
    goals = targets(changes, rates)
    show(console, changes, rates, goals)
    asked = {name: value for name, value in vars(settings).items() if name != "out"}
    found = {
        "machine": before,
        "settings": asked,
        "targets": [asdict(goal) | {"met": goal.met} for goal in goals],
        "rates": [asdict(rate) for rate in rates],
        "changes": [asdict(change) for change in changes],
    }
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"written: {settings.out}")
    return 0 if all(goal.met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
