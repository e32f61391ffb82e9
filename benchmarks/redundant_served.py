"""Columns as they begin, moved by load, and moved and copied by load, in one running server under load.

    python -m benchmarks.redundant_served [--repetitions 3] [--out benchmarks/results/rebalance/copies-served.json]

A tiny model whose router sends nearly all tokens to a quarter of its experts, on three ranks. After the columns as
they begin, moved and copied take turns: `elasticmoe rebalance` with no copies, then with the server's. In each state
routing is observed for a while under the same load: what each rank has computed by its own count, and output tokens per
second.
With fewer cores than ranks the fullest rank's time is hidden: the others wait for a core as it computes. Balance is
not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.scaling.machine import describe
from elasticmoe_sglang.tiny_model import VOCAB, make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.load import Load, Pump, Stream

RANKS, COPIES, SKEW = 3, 6, 10.0
STREAMS, PROMPT, OUTPUT = 12, 96, 16
OBSERVE_S = 12.0


def start(load: Load) -> Stream:
    rng = random.Random(len(load.streams) % 64)
    return load.start([rng.randrange(3, VOCAB) for _ in range(PROMPT)], OUTPUT)


def rebalance(server: ElasticServer, **body: Any) -> dict[str, Any]:
    """Its answer. Raises RuntimeError where the server refuses, or the operation is not done."""
    response = server.post("/elastic_ep/rebalance", {"observe_s": OBSERVE_S, "wait": True, "least_gain": 0.0, **body})
    answer: dict[str, Any] = response.json()
    if response.status_code != 200 or (answer["operation"] or {"phase": "done"})["phase"] != "done":
        raise RuntimeError(f"{response.status_code}: {answer}")
    return answer


def observed(server: ElasticServer, load: Load) -> dict[str, Any]:
    """Figures of the present placement."""
    began = time.time()
    answer = rebalance(server, dry_run=True)
    ended = time.time()
    status = server.status()
    routed = [status["routed"][str(rank)] for rank in range(RANKS)]
    came = sum(_tokens(stream, ended) - _tokens(stream, began) for stream in load.streams)
    return {
        "copies": answer["copies"],
        "computed_by_rank": routed,
        "fullest_over_mean": round(max(routed) * RANKS / sum(routed), 3),
        "tokens_per_s": round(came / (ended - began), 1),
    }


def _tokens(stream: Stream, until: float) -> int:
    return max((count for at, count in list(stream.arrivals) if at <= until), default=0)


def measure(repetitions: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    model = make_tiny_model(folder / "model", arch="glm4_moe", layers=6, hidden=256, skew=SKEW)
    args = ["--disable-radix-cache", "--elasticmoe-redundant-experts", str(COPIES)]
    found: dict[str, list[dict[str, Any]]] = {"as they begin": [], "moved": [], "copied": []}
    with ElasticServer(model, args, log=folder / "server.log", ep_size=RANKS) as server, Load(server.url) as load:
        with Pump(load, start, STREAMS) as pump:
            time.sleep(3.0)
            found["as they begin"] += [observed(server, load) for _ in range(repetitions)]
            for _ in range(repetitions):
                for name, copies in (("moved", 0), ("copied", COPIES)):
                    rebalance(server, copies=copies)
                    found[name].append(observed(server, load))
                    print(name, found[name][-1], flush=True)
        load.wait(pump.streams)
        failed = [str(stream) for stream in pump.streams if stream.lost]
        if failed:
            raise RuntimeError(f"requests failed: {failed}")
    return found


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):g} [{min(values):g}, {max(values):g}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures there")
    args = parser.parse_args()
    machine = describe()
    with tempfile.TemporaryDirectory(prefix="elasticmoe-redundant-") as folder:
        found = measure(args.repetitions, Path(folder))
    for name, rows in found.items():
        balance, tokens = ([row[key] for row in rows] for key in ("fullest_over_mean", "tokens_per_s"))
        copies = sorted({row["copies"] for row in rows})
        print(f"{name}: copies {copies}, fullest rank {_spread(balance)} x the mean, {_spread(tokens)} tokens/s")
    if args.out is not None:
        setting = {"ranks": RANKS, "redundant_experts": COPIES, "skew": SKEW, "streams": STREAMS, "prompt": PROMPT,
                   "output": OUTPUT, "observe_s": OBSERVE_S}  # fmt: skip
        args.out.write_text(json.dumps({"machine": machine, "setting": setting, "states": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
