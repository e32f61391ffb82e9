"""MoE kernels on expert columns against SGLang's fused MoE on one GPU: correctness, tuning, comparison.

    python benchmarks/moe_kernels.py compile PART PARTS        compile every candidate (no GPU needed)
    python benchmarks/moe_kernels.py baseline-warm MODEL       compile the baseline's kernels
    python benchmarks/moe_kernels.py run --out DIR [--tune]    all of it: tune, then compare; writes moe-h200.json
    python benchmarks/moe_kernels.py install FILE.json         write the tuned configs (no GPU needed)
    python benchmarks/moe_kernels.py plot FILE.json FILE.png   draw the curves (no GPU needed)

Times are medians of CUDA graph replays. A graph holds several calls that take turns over layers and routings, so that
weights come from memory and not from L2. Both sides get the same inputs in the same run.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "kernels")]

from moe_cases import MODELS, SHARES, SKEWED_TOKENS, TOKENS, TUNED_TOKENS, Layer, Model, make_layers, make_routing
from moe_check import check, poison, reference, relative, unmapped_slots
from moe_compile import compile_part
from moe_timing import Inputs, Timer, ceilings
from moe_tune import install, tune_point
from scaling.machine import describe

from elasticmoe_kernels.triton.config import plan_for, shape_name, tuned_entries

START = time.monotonic()
BRIEF_TOKENS = (1, 8, 16, 64, 256, 1024, 4096, 16384)
TUNED_SHARES = (1, 8)
"""EP 2 takes the plans of EP 1: the same rows per expert, half the experts."""


def say(*words: object) -> None:
    print(f"[{time.monotonic() - START:6.1f}s]", *words, flush=True)


def compare_point(
    timer: Timer, model: Model, layers: list[Layer], tokens: int, share: int, kind: str, baseline: Any,
    limits: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    inputs = Inputs(model, layers, tokens, share, kind)
    plan = plan_for(tokens, model.top_k, inputs.local, 1 / share, model.hidden, model.inter, model.weight_dtype)
    point: dict[str, Any] = {
        "model": model.name, "dtype": "fp8" if model.fp8 else "bf16", "share": share, "routing": kind, "tokens": tokens,
    }  # fmt: skip
    point.update(inputs.roofline_us(limits))
    sides = [inputs.ours(plan)] + ([inputs.theirs(baseline)] if baseline is not None else [])
    point["ours_us"], *other_us = timer.together(sides)
    bound = max(point["memory_us"], point["compute_us"])
    point.update(bound="memory" if point["memory_us"] >= point["compute_us"] else "compute",
                 roofline_fraction=bound / point["ours_us"], plan=plan.to_json())  # fmt: skip
    poison()
    sample = torch.randperm(tokens, device="cuda")[:6]
    wanted = reference(model, inputs.layers[0], inputs.x[sample], inputs.local_ids[0][sample], inputs.weights[sample])
    point["error"] = relative(sides[0][0](), sample, wanted)
    if other_us:
        point["sglang_us"] = other_us[0]
        point["speedup"] = other_us[0] / point["ours_us"]
        point["sglang_error"] = relative(sides[1][0](), sample, wanted)
    return point


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def table(points: list[dict[str, Any]]) -> None:
    """One line per model, share and routing: speedup at each size."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for p in points:
        groups.setdefault((p["model"], p["share"], p["routing"]), []).append(p)
    for key, members in groups.items():
        cells = " ".join(
            f"{p['tokens']}:{p.get('speedup', math.nan):.2f}({p['ours_us']:.0f}us,{p['roofline_fraction']:.0%})"
            for p in members
        )
        print(*key, cells)


def run(args: argparse.Namespace) -> None:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    helpers = []
    here = str(Path(__file__))
    if args.compile:
        helpers = [
            subprocess.Popen(
                [sys.executable, here, "compile", str(i), str(args.compile), *(["--all"] if args.tune else [])]
            )
            for i in range(args.compile)
        ]
    if args.site:
        wait_for(args.site)
        warm = [
            subprocess.Popen(
                [sys.executable, here, "baseline-warm", m.name], env={**os.environ, "PYTHONPATH": args.site}
            )
            for m in MODELS
        ]
        helpers += warm
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "machine": describe(), "torch": torch.__version__, "errors": [],
        "tuned": {}, "points": [], "notes": [],
    }  # fmt: skip

    def save() -> None:
        (out / "moe-h200.json").write_text(json.dumps(result))

    baseline: Any = None
    try:
        result["unmapped_slots"] = unmapped_slots()
        say("unmapped slots", result["unmapped_slots"])
    except Exception as e:
        result["notes"].append(f"unmapped slots: {type(e).__name__}: {e}"[:500])
        say(result["notes"][-1])
    layers = {m.name: make_layers(m) for m in MODELS if m.name in args.models}
    say("weights made", {n: [len(v)] for n, v in layers.items()}, torch.cuda.memory_allocated() >> 30, "GiB")
    models = [m for m in MODELS if m.name in args.models]
    for m in models if not args.skip_check else []:
        try:
            check(m, layers[m.name][0], result["errors"])
        except Exception as e:
            result["notes"].append(f"check {m.name}: {type(e).__name__}: {e}"[:500])
    say("errors", len(result["errors"]), "worst", max((e["error"] / e["limit"] for e in result["errors"]), default=0),
        [e for e in result["errors"] if not e["ok"]][:6], result["notes"])  # fmt: skip
    if args.site:
        sys.path.insert(0, args.site)
        try:
            from moe_baseline import SglangMoe

            baseline = SglangMoe()
        except Exception as e:
            result["notes"].append(f"baseline: {type(e).__name__}: {e}"[:800])
            say(result["notes"][-1])
    say("baseline imported")
    for helper in helpers:
        try:
            helper.wait(max(1, args.warm_until - (time.monotonic() - START)))
        except subprocess.TimeoutExpired:
            helper.kill()
            result["notes"].append("a warm-up process was cut off")
    say("helpers done", [h.returncode for h in helpers])
    result["ceilings"] = limits = ceilings()
    say("ceilings", limits)
    save()
    timer = Timer()
    if args.tune:
        for m in models:
            name = shape_name(m.hidden, m.inter, m.weight_dtype)
            entries = result["tuned"][name] = [
                {"tokens": e.tokens, "share": e.share, "plan": e.plan.to_json()} for e in tuned_entries(name)
            ]
            if args.tune_models and m.name not in args.tune_models:
                continue
            for share in TUNED_SHARES:
                for tokens in BRIEF_TOKENS if args.brief else TUNED_TOKENS:
                    if time.monotonic() - START > args.tune_until or tokens < args.tune_from:
                        continue
                    try:
                        entry = tune_point(timer, m, layers[m.name], tokens, share)
                    except Exception as e:
                        result["notes"].append(f"tune {m.name} {tokens} {share}: {type(e).__name__}: {e}"[:300])
                        continue
                    entries[:] = [e for e in entries if (e["tokens"], e["share"]) != (tokens, 1 / share)] + [entry]
            say("tuned", m.name, len(entries), result["notes"][-2:])
            save()
    if args.tune:
        install(result["tuned"])
    todo = [(m, s, "uniform", t) for m in models for s in SHARES for t in TOKENS]
    todo += [(m, s, "skewed", t) for m in models for s in SHARES for t in SKEWED_TOKENS]
    if args.quick:
        todo = [(m, s, "uniform", t) for m in models for s in (1, 8) for t in (1, 64, 4096)]
    if args.brief:
        todo = [(m, s, "uniform", t) for m in models for s in TUNED_SHARES for t in BRIEF_TOKENS]
    for m, share, kind, tokens in todo:
        if time.monotonic() - START > args.until:
            result["notes"].append(f"out of time before {m.name} {share} {kind} {tokens}")
            break
        try:
            result["points"].append(compare_point(timer, m, layers[m.name], tokens, share, kind, baseline, limits))
        except Exception as e:
            result["notes"].append(f"{m.name} {share} {kind} {tokens}: {type(e).__name__}: {e}"[:400])
    say("compared", len(result["points"]))
    save()
    table(result["points"])
    speedups = [p["speedup"] for p in result["points"] if "speedup" in p]
    result["geomean_speedup"] = geomean(speedups)
    result["below_one"] = sum(s < 1 for s in speedups)
    save()
    say("geomean", result["geomean_speedup"], "below 1.0:", result["below_one"], "of", len(speedups))
    say("notes", result["notes"][:12])


def wait_for(site: str) -> None:
    """Wait for the archive with SGLang, which another process unpacks; `.done` marks its end."""
    deadline = time.monotonic() + 60
    while not (Path(site) / ".done").exists() and time.monotonic() < deadline:
        time.sleep(0.2)


def baseline_warm(name: str) -> None:
    """Call the baseline at every size on small weights, so that its kernels are compiled before anything is timed."""
    from moe_baseline import SglangMoe

    model = replace(next(m for m in MODELS if m.name == name), layers=1)
    baseline = SglangMoe()
    say("baseline import", name)
    e, h, i = model.experts, model.hidden, model.inter
    w13 = torch.empty(e, 2 * i, h, dtype=model.weight_dtype, device="cuda")
    w2 = torch.empty(e, h, i, dtype=model.weight_dtype, device="cuda")
    scales = (None, None)
    if model.fp8:
        scales = (
            torch.ones(e, 2 * i // 128, h // 128, device="cuda"), torch.ones(e, h // 128, i // 128, device="cuda"),
        )  # type: ignore[assignment]  # fmt: skip
    layer = Layer(w13=w13, w2=w2, w13_scale=scales[0], w2_scale=scales[1], contiguous=(w13, w2))
    for share in (1, 8):
        for tokens in TOKENS:
            x = torch.randn(tokens, h, device="cuda", dtype=torch.bfloat16)
            ids = make_routing(model, tokens, "uniform", 1)
            ids = torch.where(ids < e // share, ids, -1)
            baseline(model, layer, share, x, ids, torch.rand(tokens, model.top_k, device="cuda"))
        torch.cuda.synchronize()
        say("baseline warm", name, share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile")
    compiling.add_argument("part", type=int)
    compiling.add_argument("parts", type=int)
    compiling.add_argument("--all", action="store_true", help="every candidate, not only what the configs name")
    commands.add_parser("baseline-warm").add_argument("model")
    installing = commands.add_parser("install")
    installing.add_argument("data")
    plot = commands.add_parser("plot")
    plot.add_argument("data")
    plot.add_argument("image")
    running = commands.add_parser("run")
    running.add_argument("--out", required=True)
    running.add_argument("--site", help="folder with SGLang for this machine; without it there is no baseline")
    running.add_argument("--models", nargs="*", default=[m.name for m in MODELS])
    running.add_argument("--tune", action="store_true")
    running.add_argument("--tune-from", type=int, default=1, help="tune for so many tokens and more, keep the rest")
    running.add_argument("--tune-models", nargs="*", help="tune these only")
    running.add_argument("--quick", action="store_true", help="a few points only")
    running.add_argument("--brief", action="store_true", help="tune and compare at every third size, EP 1 and 8")
    running.add_argument("--skip-check", action="store_true")
    running.add_argument("--compile", type=int, default=0, help="processes that compile the candidates beforehand")
    running.add_argument("--warm-until", type=float, default=120, help="seconds from the start, likewise below")
    running.add_argument("--tune-until", type=float, default=240)
    running.add_argument("--until", type=float, default=420)
    args = parser.parse_args()
    if args.command == "compile":
        compile_part(args.part, args.parts, every=args.all)
    elif args.command == "baseline-warm":
        baseline_warm(args.model)
    elif args.command == "install":
        install(json.loads(Path(args.data).read_text())["tuned"])
    elif args.command == "plot":
        from moe_plot import plot_file

        plot_file(Path(args.data), Path(args.image))
    else:
        run(args)


if __name__ == "__main__":
    main()
