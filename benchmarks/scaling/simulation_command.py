"""`elasticmoe bench simulate`: predictions for machines that are not available, and their error on the one that is."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.scaling import machine
from benchmarks.scaling.costs import MACHINES, Costs, Source
from benchmarks.scaling.report import table
from benchmarks.scaling.servers import ServerSettings
from benchmarks.scaling.simulation import (
    DecodeLoad,
    Weights,
    predict,
    predict_cold_restart,
    predict_throughput,
)
from benchmarks.scaling.validation import (
    Check,
    Measured,
    check,
    fit,
    largest_error,
    measure,
    measure_copy_rate,
    read_measured,
    recorded_checks,
)
from elasticmoe_sglang.model_shape import ModelShape, shape_of
from elasticmoe_sglang.tiny_model import make_tiny_model

_TEXT = "Simulation of machines that are not available, checked against this one"
_ROOT = Path(__file__).parents[2]
_SIZES = (8, 16, 32, 64, 128, 256)
_DTYPES = {"h200": "fp8_block128", "910c": "bfloat16"}
_CONTEXT = 4096


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command; its namespace carries `run`."""
    parser = commands.add_parser("simulate", help=_TEXT, description=f"{_TEXT}. Nothing here is a measurement.")
    parser.add_argument("--machines", nargs="+", choices=sorted(MACHINES), default=sorted(MACHINES, reverse=True))
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=_SIZES, help="device counts, in order (default: %(default)s)"
    )
    parser.add_argument("--shape", type=Path, default=_ROOT / "configs" / "models" / "deepseek-v3.json")
    parser.add_argument(
        "--context", type=int, default=_CONTEXT, help="tokens in a request's KV cache (default: %(default)s)"
    )
    parser.add_argument("--points", type=Path, help="use the measured changes of an earlier run, instead of measuring")
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results" / "simulate")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write and print the report."""
    args.out.mkdir(parents=True, exist_ok=True)
    shape = shape_of(json.loads(args.shape.read_text()))
    sections = [
        "# SIMULATION: changes of size on machines that are not available",
        "Nothing on this page was measured on H200 or Ascend clusters. A discrete-event model of what this project "
        f"does, fed with the costs below, predicts {args.shape.stem} on {min(args.sizes)} to "
        f"{max(args.sizes)} devices. "
        "Changes beyond one host, and beyond 64 ranks, are not supported by this version. Definitions: "
        "docs/benchmarks.md.",
    ]
    data: dict[str, Any] = {"simulation": True, "machine": machine.describe(), "machines": {}}
    checks, costs = _validate(args)
    checks += recorded_checks(MACHINES["h200"])
    data["check"] = {"costs": costs, "points": checks}
    errors = {way: largest_error(checks, up=way == "up") for way in ("up", "down")}
    data["largest_error"] = errors
    sections.append(
        f"Every predicted time stands with the range that the largest error of the checks below leaves: up by "
        f"{errors['up']:.1f} times either way, down by {errors['down']:.1f} times. None of the checks is of more than "
        "four ranks or of a second host: beyond those the range is a lower limit of the uncertainty."
    )
    for name in args.machines:
        rows = predictions(MACHINES[name], shape, _DTYPES[name], args.sizes, args.context)
        data["machines"][name] = rows
        sections += [f"## {MACHINES[name].name}, experts in {_DTYPES[name]}", _predictions_table(rows, errors)]
    sections += ["## Error against measured changes", _error_text(checks), _check_table(checks)]
    sections += ["## Costs and where they come from", *(_costs_table(MACHINES[name]) for name in args.machines)]
    report = "\n\n".join(sections) + "\n"
    (args.out / "report.md").write_text(report)
    (args.out / "figures.json").write_bytes(msgspec.json.format(msgspec.json.encode(data), indent=1) + b"\n")
    _draw(data["machines"], args.out / "figures.png")
    print(report)
    return 0


def predictions(
    costs: Costs, shape: ModelShape, dtype: str, sizes: Sequence[int], context: int
) -> list[dict[str, Any]]:
    """One row for each step up and down between neighbouring sizes."""
    weights = Weights(columns=shape.experts, column_bytes=shape.column_bytes(dtype), dense_bytes=shape.dense_bytes())
    # Hidden states of a token go out and come back in bfloat16, once for each of 8 experts; DeepSeek-V3's hidden size.
    load = DecodeLoad(
        kv_bytes=shape.kv_bytes_per_token(), context=context, exchange_bytes=2 * 8 * 7168 * 2, layers=shape.moe_layers
    )
    rows = []
    steps = list(itertools.pairwise(sizes))
    for old, new in [*steps, *((new, old) for old, new in steps)]:
        rates = [predict_throughput(costs, weights, size, load) for size in (old, new)]
        row: dict[str, Any] = {"old": old, "new": new, "nodes": [-(-size // costs.per_node) for size in (old, new)]}
        if any(rate is None for rate in rates):
            rows.append(row | {"fits": False})
            continue
        eager, captured = (predict(costs, weights, old, new, capture=capture) for capture in (False, True))
        rows.append(
            row
            | {
                "fits": True,
                "scale_latency_s": eager.scale_latency_s,
                "scale_latency_with_capture_s": captured.scale_latency_s,
                "without_standby_s": predict(costs, weights, old, new, capture=False, standby=False).scale_latency_s,
                "phases": dict(eager.phases),
                "columns_moved": eager.columns_moved,
                "bytes_moved": eager.bytes_moved,
                "cold_restart_s": predict_cold_restart(costs, weights, new),
                "tokens_per_s": rates,
            }
        )
    return rows


def _validate(args: argparse.Namespace) -> tuple[list[Check], Costs]:
    with tempfile.TemporaryDirectory(prefix="elasticmoe-bench-") as folder:
        model = make_tiny_model(Path(folder) / "model", layers=8, hidden=512, experts=32)
        shape = shape_of(json.loads((model / "config.json").read_text()))
        if args.points:
            found = read_measured(args.points)
        else:
            (args.out / "logs").mkdir(parents=True, exist_ok=True)  # which git ignores
            settings = ServerSettings(model=str(model), device="cpu", kv_tokens=4096, log_dir=args.out / "logs")
            copy_rate = measure_copy_rate()
            found = Measured(copy_rate=copy_rate, points=asyncio.run(measure(settings)))
            (args.out / "points.json").write_bytes(msgspec.json.format(msgspec.json.encode(found)))
    # float32 on the CPU: twice the bytes of bfloat16.
    weights = Weights(
        columns=shape.experts, column_bytes=2 * shape.column_bytes("bfloat16"), dense_bytes=2 * shape.dense_bytes()
    )
    costs = fit(found.points, weights, found.copy_rate)
    return check(found.points, weights, costs), costs


def _predictions_table(rows: Sequence[dict[str, Any]], errors: Mapping[str, float]) -> str:
    def ranged(row: dict[str, Any], key: str) -> str:
        seconds, factor = row[key], errors["up" if row["new"] > row["old"] else "down"]
        low, middle, high = (f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in
                             (seconds / factor, seconds, seconds * factor))  # fmt: skip
        return f"{middle} s ({low} to {high})"

    header = [
        "devices", "nodes", "scale latency", "of it boot / dense / columns",
        "with graph capture", "no standby", "cold restart", "columns", "moved", "tokens/s before → after",
    ]  # fmt: skip
    lines = []
    for row in rows:
        first = [f"{row['old']} → {row['new']}", " → ".join(map(str, row["nodes"]))]
        if not row["fits"]:
            lines.append([*first, "weights do not fit", *[""] * 7])
            continue
        phases = " / ".join(f"{row['phases'].get(name, 0.0):.2f}" for name in ("boot", "dense weights", "columns"))
        lines.append(
            [
                *first,
                ranged(row, "scale_latency_s"),
                f"{phases} s",
                ranged(row, "scale_latency_with_capture_s"),
                ranged(row, "without_standby_s"),
                f"{row['cold_restart_s']:.0f} s",
                str(row["columns_moved"]),
                f"{row['bytes_moved'] / 2**30:.0f} GiB",
                " → ".join(f"{rate:,.0f}" for rate in row["tokens_per_s"]),
            ]
        )
    return table(header, lines)


def _check_table(checks: Sequence[Check]) -> str:
    rows = [
        [
            f"{c.point.old_size} → {c.point.new_size}", f"{c.point.latency_s:.2f} s", f"{c.predicted_s:.2f} s",
            f"{c.error:+.0%}", "fitted" if c.fitted else "predicted", c.where,
        ]
        for c in checks
    ]  # fmt: skip
    return table(["change", "measured", "simulated", "error", "", "on"], rows)


def _error_text(checks: Sequence[Check]) -> str:
    errors = sorted(abs(c.error) for c in checks if not c.fitted)
    return (
        "An idle elastic server with a tiny model on this machine, where boot, commit and column are fitted on 1 → 2 "
        "and 2 → 1; and changes recorded on GPUs, against the costs of H200 below. The "
        f"other {len(errors)} changes are predictions: median error {errors[len(errors) // 2]:.0%}, largest "
        f"{errors[-1]:.0%}. "
        "The first check the structure of the model (the order of waiting), the second the numbers for a GPU, copies "
        "excepted: those ranks shared one GPU. Nothing checks what is assumed of networks and of Ascend."
    )


def _costs_table(costs: Costs) -> str:
    rows = [[name, f"{c.value:.4g}", _mark(c.source), c.origin] for name, c in costs.numbers()]
    return f"**{costs.name}**, {costs.per_node} devices per node; SI units\n\n" + table(
        ["cost", "value", "source", "origin"], rows
    )


def _mark(source: Source) -> str:
    return f"**{source.value}**" if source is Source.ASSUMED else source.value


def _draw(machines: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, rows in machines.items():
        up = [row for row in rows if row["fits"] and row["new"] > row["old"]]
        ticks = [row["new"] for row in up]
        [line] = axes.plot(ticks, [row["scale_latency_s"] for row in up], marker="o", label=f"{name}: elastic")
        captured = [row["scale_latency_with_capture_s"] for row in up]
        axes.plot(ticks, captured, ":", marker=".", color=line.get_color(), label=f"{name}: with graph capture")
        cold = [row["cold_restart_s"] for row in up]
        axes.plot(ticks, cold, "--", marker="x", color=line.get_color(), label=f"{name}: cold restart")
    axes.set(xscale="log", yscale="log", xlabel="devices after doubling", ylabel="scale latency, seconds")
    axes.set_xticks(_SIZES[1:], [str(size) for size in _SIZES[1:]])
    axes.set_title("SIMULATION, not a measurement: DeepSeek-V3")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
