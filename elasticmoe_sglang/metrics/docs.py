"""docs/metrics.md from the table of metrics.

python -m elasticmoe_sglang.metrics.docs docs/metrics.md           write it
python -m elasticmoe_sglang.metrics.docs --check docs/metrics.md   exit status 1 where it differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from elasticmoe_sglang.generated_page import write_or_check
from elasticmoe_sglang.metrics.table import SECONDS, TABLE, Metric

_HEAD = f"""# Metrics

Generated from `elasticmoe_sglang/metrics/table.py` by `make metrics-doc`; do not edit.

With SGLang's `--enable-metrics` these stand on its `/metrics`, beside SGLang's own; without it none of them is
registered and nothing is measured. Names and labels of the first three are upstream SGLang's. Gauges follow within a
second. Histograms have these buckets, in seconds: {", ".join(f"{bound:g}" for bound in SECONDS)}.

Metrics under *Policy* have values only where the policy runs. [operations.md](operations.md#metrics-and-traces) says
how to look at them; `configs/grafana` and `configs/prometheus` have a dashboard and alerts.

"""


def render(table: Iterable[Metric]) -> str:
    """The whole page as Markdown: two tables, and the labels."""
    metrics = list(table)
    served = [metric for metric in metrics if not metric.policy]
    policy = [metric for metric in metrics if metric.policy]
    labelled = [metric for metric in metrics if metric.labels]
    labels = "".join(
        f"| `{metric.name}` | `{label}` | {values} |\n"
        for metric in labelled
        for label, values in metric.labels.items()
    )
    return (
        f"{_HEAD}{_rows(served)}\n## Policy\n\n{_rows(policy)}"
        f"\n## Labels\n\n| Metric | Label | Values |\n|---|---|---|\n{labels}"
    )


def _rows(metrics: Sequence[Metric]) -> str:
    rows = "".join(
        f"| `{metric.name}`{_braces(metric)} | {metric.kind} | {metric.unit} | {metric.help} |\n" for metric in metrics
    )
    return f"| Metric | Type | Unit | Meaning |\n|---|---|---|---|\n{rows}"


def _braces(metric: Metric) -> str:
    return f" {{{', '.join(metric.labels)}}}" if metric.labels else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; returns the exit status."""
    return write_or_check(
        argv,
        module="elasticmoe_sglang.metrics.docs",
        source="the table of metrics",
        make="metrics-doc",
        render=lambda: render(TABLE),
    )


if __name__ == "__main__":
    sys.exit(main())
