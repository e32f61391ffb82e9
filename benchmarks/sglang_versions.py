"""What a server costs to start and to change with each supported SGLang, on the CPU.

    make venv && make venv SGLANG=0.5.21
    python -m benchmarks.sglang_versions --beside .venv-sglang-0.5.21/bin/python --out benchmarks/results/versions.json

One server after the other, the versions in turn: seconds until it is healthy, then 2 -> 3 -> 1 -> 4 -> 2 while streams
decode: each change's seconds, each rank's pause, and tokens/s in a steady second before it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cuda_scaling import tokens_between
from benchmarks.cuda_server import ids, must_scale, outcome, standbys, streaming
from benchmarks.scaling.machine import describe
from benchmarks.scaling.servers import Instance, ServerSettings
from benchmarks.streams import Ask, Load
from elasticmoe_sglang.tiny_model import make_tiny_model

SIZES = (2, 3, 1, 4, 2)
CAPACITY = 4
STREAMS = 8
TOKENS = 160
KV_TOKENS = 16384
_STEADY_S = 2.0
_LIMIT_S = 120.0
_ASKS_VERSION = "import importlib.metadata; print(importlib.metadata.version('sglang'))"


async def measure(python: str, settings: ServerSettings, number: int) -> dict[str, Any]:
    """One server of this interpreter from its start through all changes."""
    args = [*settings.elastic(SIZES[0], CAPACITY), "--standbys", str(CAPACITY - 1)]
    log = settings.log_dir / f"{number}.log"
    instance = Instance(args, plain=False, generation=number, size=CAPACITY, log=log)
    instance.command[0] = python
    waiting = argparse.Namespace(hot_standbys=0, section_s=_LIMIT_S)
    changes = []
    async with instance:
        load = Load(instance.client, lambda lane, n: Ask(key="", prompt=ids(lane * 1009 + n), tokens=TOKENS))
        async with streaming(load, STREAMS):
            for before, size in itertools.pairwise(SIZES):
                await standbys(instance, size - before, waiting)
                await asyncio.sleep(_STEADY_S)
                changes.append(await change(instance, load, size))
        return {"boot_s": round(instance.boot_s, 2), "changes": changes, **outcome(load)}


async def change(instance: Instance, load: Load, size: int) -> dict[str, Any]:
    started = time.monotonic()
    operation = await must_scale(instance, size)
    seconds = time.monotonic() - started
    return {
        "from": operation["old_ep_size"],
        "to": size,
        "seconds": round(seconds, 3),
        "pauses_ms": [round(pause, 2) for pause in operation["pause_ms"].values()],
        "tokens_per_s_before": tokens_between(load, started - 1.0, started),
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians with the least and the largest; n is the number of servers."""

    def spread(values: Sequence[float]) -> dict[str, float]:
        return {"median": round(statistics.median(values), 3), "least": min(values), "most": max(values)}

    changes = [each for run in runs for each in run["changes"]]
    found = {"n": len(runs), "boot_s": spread([run["boot_s"] for run in runs])}
    for before, size in itertools.pairwise(SIZES):
        found[f"{before} -> {size}, s"] = spread(
            [c["seconds"] for c in changes if (c["from"], c["to"]) == (before, size)]
        )
    found["pause_ms"] = spread([pause for each in changes for pause in each["pauses_ms"]])
    found["tokens_per_s"] = spread([each["tokens_per_s_before"] for each in changes])
    found["requests"] = sum(run["requests"] for run in runs)
    found["lost"] = sum(len(run["lost"]) for run in runs)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sglang_versions", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--beside", required=True, help="the interpreter that has the other SGLang")
    parser.add_argument("--repetitions", type=int, default=5, help="servers of each version")
    settings = parser.parse_args()
    pythons = {
        subprocess.run([python, "-c", _ASKS_VERSION], check=True, capture_output=True, text=True).stdout.strip(): python
        for python in (sys.executable, settings.beside)
    }
    runs: dict[str, list[dict[str, Any]]] = {version: [] for version in pythons}
    result: dict[str, Any] = {
        "machine": describe(),
        "command": f"python -m benchmarks.sglang_versions --beside PYTHON --repetitions {settings.repetitions}",
        "runs": runs,
    }
    with tempfile.TemporaryDirectory(prefix="sglang-versions-") as name:
        folder = Path(name)
        model = str(make_tiny_model(folder / "model", arch="qwen3_moe"))
        servers = ServerSettings(model=model, device="cpu", kv_tokens=KV_TOKENS, log_dir=folder)
        dice = random.Random(1)
        numbers = itertools.count()
        for _ in range(settings.repetitions):
            for version in dice.sample(sorted(pythons), len(pythons)):
                runs[version].append(asyncio.run(measure(pythons[version], servers, next(numbers))))
                print(version, json.dumps(runs[version][-1]), flush=True)
    result["summary"] = {version: summary(found) for version, found in runs.items()}
    settings.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
