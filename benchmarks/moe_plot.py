"""Draw the curves of moe_kernels.py: speedup over SGLang and fraction of the roofline, by tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SHARE_COLORS = {1: "#1f77b4", 2: "#2ca02c", 8: "#d62728"}


def plot_file(data: Path, image: Path) -> None:
    """data: the JSON that `run` wrote. image: PNG to write."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    result: dict[str, Any] = json.loads(data.read_text())
    points: list[dict[str, Any]] = result["points"]
    models = list(dict.fromkeys(p["model"] for p in points))
    figure, axes = plt.subplots(2, len(models), figsize=(5 * len(models), 8), sharex=True, squeeze=False)
    for column, model in enumerate(models):
        for share, color in SHARE_COLORS.items():
            for kind, style in (("uniform", "-o"), ("skewed", "--x")):
                line = [p for p in points if (p["model"], p["share"], p["routing"]) == (model, share, kind)]
                tokens = [p["tokens"] for p in line]
                label = f"EP {share}, {kind}"
                axes[0][column].plot(tokens, [p["speedup"] for p in line], style, color=color, label=label, ms=4)
                axes[1][column].plot(tokens, [p["roofline_fraction"] for p in line], style, color=color, ms=4)
        axes[0][column].set_title(f"{model} ({next(p['dtype'] for p in points if p['model'] == model)})")
        axes[0][column].axhline(1.0, color="black", lw=0.8)
        axes[0][column].set_yscale("log", base=2)
        axes[0][column].set_yticks([1, 1.5, 2, 3], ["1.0", "1.5", "2.0", "3.0"])
        axes[1][column].set_ylim(0, 1.05)
        axes[1][column].set_xlabel("tokens")
        for row in axes:
            row[column].set_xscale("log", base=2)
            row[column].grid(alpha=0.3)
    axes[0][0].set_ylabel("times SGLang's fused MoE")
    axes[1][0].set_ylabel("fraction of the measured roofline")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(
        f"MoE layer on expert columns, {result['device']}: geometric mean {result['geomean_speedup']:.2f} x SGLang"
        f" over {len(points)} points"
    )
    figure.tight_layout()
    figure.savefig(image, dpi=110)
