"""Processes of a server on a GPU are killed while streams decode; sections of `benchmarks.cuda_scaling`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import time
from contextlib import suppress
from typing import Any

import psutil

from benchmarks.cuda_server import (
    Device,
    Servers,
    fresh,
    mixed_load,
    outcome,
    processes_of,
    resize,
    scale,
    standbys,
    status_of,
    streaming,
)
from benchmarks.scaling.servers import Instance
from benchmarks.streams import Ask, Load

DEATHS: tuple[tuple[int, tuple[int | str, ...]], ...] = (
    (4, (3,)), (4, ("HMM",)), (4, (1, 2)), (2, (0,)), (2, (0, 1)), (2, ("HMM", 1)),
)  # fmt: skip
"""The number of ranks, and who is killed together, in section deaths: by place among the active ranks, which need not
be 0, 1, 2 after an earlier death."""


async def deaths(servers: Servers, settings: argparse.Namespace, record: dict[str, Any], device: Device) -> None:
    instance = await servers.get("elastic")
    load = Load(
        instance.client,
        lambda lane, n: Ask(key="", prompt=fresh(lane * 1_000_003 + n, 32), tokens=settings.stream_tokens),
    )
    rows = record["rows"] = []
    try:
        async with streaming(load, settings.streams):
            for size, victims in DEATHS:
                await resize(instance, size, settings)
                waited = await standbys(instance, min(3, settings.ranks - size), settings)
                rows.append({"waited_for_standbys_s": waited} | await kill(instance, load, victims))
                print(json.dumps(rows[-1]), flush=True)
    finally:
        record.update(outcome(load))


async def kill(instance: Instance, load: Load, victims: tuple[int | str, ...]) -> dict[str, Any]:
    """SIGKILL to the workers of some ranks, or to the HMM, at once; waits until the server is whole again."""
    await asyncio.sleep(1.0)
    before = await status_of(instance)
    hmm = int(before["memory"]["pid"])
    pids = {rank["rank"]: int(rank["pid"]) for rank in before["ranks"] if rank["state"] == "active"}
    ranks = sorted(pids)
    victims = tuple(victim if victim == "HMM" else ranks[int(victim)] for victim in victims)
    at = time.monotonic()
    for victim in victims:
        os.kill(hmm if victim == "HMM" else pids[int(victim)], signal.SIGKILL)
    while True:
        status = await status_of(instance)
        active = {rank["rank"]: rank["pid"] for rank in status["ranks"] if rank["state"] == "active"}
        dead = {pids[int(victim)] for victim in victims if victim != "HMM"}
        survived = not dead or (status["epoch"] > before["epoch"] and not dead & set(active.values()))
        remembered = status["memory"]["available"] and ("HMM" not in victims or status["memory"]["pid"] != hmm)
        if survived and remembered and set(active) == set(status["membership"]):
            break
        if time.monotonic() - at > 60:
            raise RuntimeError(f"not whole 60 s after {victims} died: {json.dumps(status)[:1500]}")
        await asyncio.sleep(0.02)
    whole = time.monotonic()
    await asyncio.sleep(1.0)
    gaps = [max((gap for t, gap in each.gaps() if t >= at and t - gap <= whole), default=0.0) for each in load.records]
    return {
        "killed": list(victims),
        "ranks_before": ranks,
        "ranks_after": status["membership"],
        "whole_s": round(whole - at, 3),
        "longest_gap_ms": round(max(gaps) * 1e3, 1),
        "lost": len(load.lost),
    }


async def storm(servers: Servers, settings: argparse.Namespace, record: dict[str, Any], device: Device) -> None:
    """Random sizes and ranks to retire, with SIGKILL to a random process while they change."""
    instance = await servers.get("elastic")
    dice = random.Random(settings.seed)
    load = mixed_load(instance, settings)
    rows = record["rows"] = []
    try:
        async with streaming(load, settings.streams):
            for number in range(settings.storm):
                row = {"number": number} | await strike(instance, dice, settings.ranks, kill=number % 2 == 1)
                rows.append(row | {"requests": len(load.records), "lost": len(load.lost)})
                print(json.dumps(rows[-1]), flush=True)
    finally:
        record.update(outcome(load))
        whole = sorted(row["whole_s"] for row in rows if row["killed"])
        record["summary"] = {
            "changes": len(rows),
            "kills": len(whole),
            "lost": len(load.lost),
            "whole_s": {"median": statistics.median(whole), "most": whole[-1]} if whole else None,
        }


async def strike(instance: Instance, dice: random.Random, most: int, *, kill: bool) -> dict[str, Any]:
    """One change to a random size up to `most`, or of a random rank, and perhaps a kill while it runs; returns when all
    is whole."""
    before = await status_of(instance)
    members = before["membership"]
    size = dice.choice([size for size in range(1, most + 1) if size != len(members)])
    body: dict[str, Any] = {"new_ep_size": size}
    if len(members) > 1 and dice.random() < 0.3:
        body = {"retire_ranks": [dice.choice(members[1:])]}  # rank 0 leads the commit barrier
    started = time.monotonic()
    victim = ""
    asked = asyncio.ensure_future(scale(instance, body))
    if kill:
        await asyncio.sleep(dice.uniform(0.0, 0.25))
        victim = await kill_one(instance, dice)
    operation = await asked
    while True:
        status = await status_of(instance)
        states = {rank["rank"]: rank["state"] for rank in status["ranks"]}
        settled = status["running"] is None and status["membership"] == status["target_ranks"]
        if settled and status["memory"]["available"] and all(states[r] == "active" for r in status["membership"]):
            break
        if time.monotonic() - started > 100:
            raise RuntimeError(f"not whole after 100 s: {json.dumps(status)[:1500]}")
        await asyncio.sleep(0.05)
    ended = time.monotonic()
    await asyncio.sleep(0.5)
    return {
        "asked": body,
        "killed": victim,
        "phase": operation.get("phase", str(operation)[:200]),
        "members": status["membership"],
        "whole_s": round(ended - started, 3),
    }


async def kill_one(instance: Instance, dice: random.Random) -> str:
    """SIGKILL to a rank's worker in any state, the HMM or the IMM; returns whom."""
    status = await status_of(instance)
    workers = [
        (f"rank {rank['rank']}, {rank['state']}", int(rank["pid"]))
        for rank in status["ranks"]
        if rank["pid"] and rank["state"] in ("active", "joining", "retiring", "hot")
    ]
    others = [("HMM", int(status["memory"]["pid"]))] if status["memory"]["available"] else []
    for process in processes_of(instance):
        with suppress(psutil.NoSuchProcess):  # also one that has ended and is not buried yet
            if "elasticmoe_patches.imm" in process.cmdline():
                others.append(("IMM", process.pid))
    name, pid = dice.choice(workers + others)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return name
