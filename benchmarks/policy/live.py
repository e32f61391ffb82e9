"""`elasticmoe bench autoscale --live`: the policy against fixed sizes on a real server, with a core for each rank.

Capacity of every size is measured first, closed-loop; the loads peak between the smallest and the largest, so that the
smallest one must fail. Every run has a server of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from benchmarks.policy import live_report
from benchmarks.policy.live_report import Capacity, LiveFigures, LiveRun, Quantiles
from benchmarks.policy.player import Played, closed_loop, held_ranks, itl_s, met, play, tokens_between, ttft_s
from benchmarks.policy.traces import LIVE, Request, Trace, make_trace, read_trace
from benchmarks.scaling import machine
from benchmarks.scaling.workload import Lengths
from benchmarks.server import ElasticServer, ServerFailed
from elasticmoe_sglang.api.types import OperationList
from elasticmoe_sglang.coordinator.status import Operation
from elasticmoe_sglang.cpu_bind import OFF, resolve, usable_cores
from elasticmoe_sglang.errors import UserInputError
from elasticmoe_sglang.policy.settings import Autoscale, Slo, parse_slo
from elasticmoe_sglang.policy.view import PolicyView
from elasticmoe_sglang.tiny_model import make_tiny_model

HIDDEN, LAYERS, EXPERTS = 768, 6, 16
_SLOTS = 16
"""Requests that run together on one rank."""
_KV_TOKENS = 16384
_SETTLE_S, _MEASURE_S = 4.0, 12.0
_PEAK = 0.9
_ANSWER_S = 60.0
QUICK = {
    "grow_cool_down_s": 1.0, "shrink_cool_down_s": 5.0, "fast_window_s": 4.0, "slow_window_s": 8.0, "drain_s": 3.0,
}  # fmt: skip
"""The policy's windows, shorter as the loads are: the rest is default."""


@dataclass(frozen=True)
class Governor:
    """Who decides the size. policy: settings on top of QUICK; None: the size is fixed."""

    name: str
    first: int
    policy: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all runs have in common."""

    model: Path
    largest: int
    slo: Slo
    log_dir: Path
    prompt: Lengths
    output: Lengths

    @property
    def cores(self) -> str:
        return resolve("auto", usable_cores(), ranks=self.largest, devices=self.largest)

    def serve_args(self, size: int) -> list[str]:
        return [
            *("--model-path", str(self.model), "--ep-size", str(size), "--max-ep-size", str(self.largest)),
            *("--cpu-bind", self.cores, "--device", "cpu", "--max-total-tokens", str(_KV_TOKENS)),
            *("--max-running-requests", str(_SLOTS * self.largest), "--skip-server-warmup", "--log-level", "warning"),
        ]

    def server(self, size: int, log: str) -> ElasticServer:
        return ElasticServer(self.serve_args(size), log=self.log_dir / f"{log}.log")

    @property
    def mean(self) -> Request:
        """A request of mean lengths, of uniform ones."""
        prompt, output = ((lengths.low + lengths.high) // 2 for lengths in (self.prompt, self.output))
        return Request(at=0.0, prompt_tokens=prompt, output_tokens=output)

    def governors(self) -> tuple[Governor, ...]:
        """In the order of their runs. The policy starts at the smallest size."""
        return (
            Governor("policy", 1, {"forecast": True}),
            Governor("largest fixed", self.largest),
            Governor("smallest fixed", 1),
            Governor("policy without forecast", 1, {"forecast": False}),
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a real server", "Measured, on the CPU. The scenarios and --out differ then.")
    group.add_argument("--live", action="store_true", help="play the loads against a real server with a core per rank")
    group.add_argument("--largest", type=int, default=2, help="ranks; at least so many cores (default: %(default)s)")
    group.add_argument("--model-path", type=Path, help="model to serve (default: a tiny one, made for the run)")
    group.add_argument("--hidden", type=int, default=HIDDEN, help="width of the tiny model (default: %(default)s)")
    group.add_argument("--layers", type=int, default=LAYERS, help="and its layers (default: %(default)s)")
    group.add_argument("--repeat", type=int, default=1, help="runs of each case (default: %(default)s)")
    group.add_argument("--runs", type=int, help="stop after so many runs; --resume continues")


def run(args: argparse.Namespace, invocation: str) -> int:
    """Write figures.json and report.md after every run; 0 when all ran.

    Raises:
        UserInputError: an impossible setting, fewer cores than ranks, or a load that could not fail.
        ServerFailed: a server did not start or died.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "logs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model_path or make_tiny_model(
            Path(folder) / "model", hidden=args.hidden, layers=args.layers, experts=EXPERTS
        )
        bench = Bench(
            model=model,
            largest=args.largest,
            slo=parse_slo(args.slo),
            log_dir=args.out / "logs",
            prompt=Lengths.parse(args.prompt_tokens),
            output=Lengths.parse(args.output_tokens),
        )
        if bench.cores == OFF:
            raise UserInputError(
                f"{args.largest} ranks need a core each, and this process may use {len(usable_cores())}"
            )
        figures = _figures(args, bench, invocation)
        asyncio.run(_run(args, bench, figures))
    return 0


def _figures(args: argparse.Namespace, bench: Bench, invocation: str) -> LiveFigures:
    path = args.out / "figures.json"
    if args.resume and path.exists():
        return msgspec.json.decode(path.read_bytes(), type=LiveFigures)
    tiny = f"tiny Qwen3-MoE, {args.hidden} wide, {args.layers} layers, {EXPERTS} experts, float32"
    return LiveFigures(
        invocation=invocation,
        machine=machine.describe(),
        commit=live_report.commit(),
        model=str(args.model_path or tiny),
        serve=shlex.join(bench.serve_args(1)[2:]),
        slo=str(bench.slo),
        prompt=args.prompt_tokens,
        output=args.output_tokens,
        policy=dict(QUICK),
        seed=args.seed,
    )


async def _run(args: argparse.Namespace, bench: Bench, figures: LiveFigures) -> None:
    if not figures.capacities:
        figures.capacities = await measure_capacity(bench)
        _write(args.out, figures)
    smallest, largest = figures.capacities[0].tokens_per_s, figures.capacities[-1].tokens_per_s
    peak = _PEAK * largest
    if peak <= smallest:
        raise UserInputError(
            f"{bench.largest} ranks make {largest:.0f} tokens/s and one makes {smallest:.0f}: a load within the "
            "largest size's capacity could not fail at the smallest",
            hint="Give a larger model: computing must dominate",
        )
    rate = peak / bench.mean.output_tokens
    traces = [
        make_trace(kind, rate, bench.prompt, bench.output, seed=args.seed, excerpt=LIVE[kind]) for kind in args.traces
    ]
    if args.file is not None:
        traces.append(read_trace(args.file))
    ran = 0
    for repetition in range(args.repeat):
        for trace in traces:
            for governor in bench.governors():
                if figures.has(trace.name, governor.name, repetition):
                    continue
                if args.runs is not None and ran >= args.runs:
                    return
                ran += 1
                figures.runs.append(await play_governed(bench, trace, governor, repetition))
                _write(args.out, figures)
                print(f"elasticmoe bench: {live_report.line(figures.runs[-1])}", file=sys.stderr, flush=True)


def _write(out: Path, figures: LiveFigures) -> None:
    (out / "figures.json").write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=1) + b"\n")
    (out / "report.md").write_text(live_report.markdown(figures))


async def measure_capacity(bench: Bench) -> list[Capacity]:
    """Of every size, with all slots of its ranks taken."""
    found = []
    async with bench.server(1, "capacity") as server, aiohttp.ClientSession(server.url) as session:
        for size in range(1, bench.largest + 1):
            if size > 1:
                await _post(session, "/scale_elastic_ep", {"new_ep_size": size, "wait": True})
            load = os.getloadavg()[0]
            begin = time.monotonic() + _SETTLE_S
            records = await closed_loop(server.url, _SLOTS * size, bench.mean, _SETTLE_S, _MEASURE_S)
            tokens = tokens_between(records, begin, begin + _MEASURE_S)
            ended = [record for record in records if record.complete]
            capacity = Capacity(
                size=size,
                streams=_SLOTS * size,
                seconds=_MEASURE_S,
                tokens_per_s=round(tokens / _MEASURE_S, 1),
                itl_s=Quantiles.of([itl_s(record) for record in ended]),
                load_average=load,
            )
            found.append(capacity)
            print(f"elasticmoe bench: {size} ranks: {capacity.tokens_per_s} tokens/s", file=sys.stderr, flush=True)
    return found


async def play_governed(bench: Bench, trace: Trace, governor: Governor, repetition: int) -> LiveRun:
    """One run, on a server of its own."""
    name = f"{trace.name}-{governor.name}-{repetition}".replace(" ", "-")
    async with bench.server(governor.first, name) as server, aiohttp.ClientSession(server.url) as session:
        # What each size loads and compiles at its first use is no part of the run.
        await closed_loop(server.url, 2 * governor.first, bench.mean, 0.0, _SETTLE_S)
        if governor.policy is not None:
            body = {"slo": str(bench.slo), "autoscale": Autoscale.ON.value, **QUICK, **governor.policy}
            await _post(session, "/elastic_ep/policy", body)
        load = os.getloadavg()[0]
        watcher = asyncio.create_task(server.died())
        playing = asyncio.create_task(play(server.url, trace))
        await asyncio.wait([watcher, playing], return_when=asyncio.FIRST_COMPLETED)
        if watcher.done():
            playing.cancel()
            watcher.result()
        watcher.cancel()
        played = playing.result()
        operations = msgspec.json.decode(await _get(session, "/elastic_ep/operations"), type=OperationList).operations
        view = msgspec.json.decode(await _get(session, "/elastic_ep/policy?limit=1000"), type=PolicyView)
    found = as_run(trace, governor, repetition, bench.slo, played, operations, view, load)
    return msgspec.structs.replace(found, commit=live_report.commit())


def as_run(
    trace: Trace,
    governor: Governor,
    repetition: int,
    slo: Slo,
    played: Played,
    operations: Sequence[Operation],
    view: PolicyView,
    load: float,
) -> LiveRun:
    """The figures of what was played."""
    rank_seconds, sizes = held_ranks(governor.first, operations, played.started_unix, trace.duration_s)
    records = played.records
    begin = played.started_at
    return LiveRun(
        trace=trace.name,
        duration_s=trace.duration_s,
        governor=governor.name,
        repetition=repetition,
        requests=len(records),
        attained=sum(met(record, slo) for record in records),
        incomplete=sum(not record.complete for record in records),
        failures=sorted({record.failure for record in records if record.failure is not None})[:5],
        tokens_per_s=round(tokens_between(records, begin, begin + trace.duration_s) / trace.duration_s, 1),
        rank_seconds=round(rank_seconds, 1),
        sizes=sizes,
        ttft_s=Quantiles.of([ttft_s(record) for record in records]),
        itl_s=Quantiles.of([itl_s(record) for record in records]),
        client_lag_s=round(played.lag_s, 3),
        load_average=load,
        actions=[
            f"{d.at - played.started_unix:.0f} s: {d.ranks} -> {d.desired}, because {d.because}"
            for d in reversed(view.decisions)
            if d.acted
        ],
    )


async def _post(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> bytes:
    async with session.post(path, json=body, timeout=aiohttp.ClientTimeout(total=_ANSWER_S)) as response:
        return await _body(response)


async def _get(session: aiohttp.ClientSession, path: str) -> bytes:
    async with session.get(path, timeout=aiohttp.ClientTimeout(total=_ANSWER_S)) as response:
        return await _body(response)


async def _body(response: aiohttp.ClientResponse) -> bytes:
    body = await response.read()
    if response.status != 200:
        raise ServerFailed(f"{response.url.path} answered {response.status}: {body.decode(errors='replace')[:300]}")
    return body
