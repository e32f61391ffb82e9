"""The table in docs/benchmarks.md is what the tool wrote from the committed figures."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from benchmarks.scaling import page
from benchmarks.scaling.figures import ChangeFigures, Figures, Rate, Slo, Spread
from benchmarks.scaling.report import Result, Results
from elasticmoe_sglang.errors import UserInputError

REPOSITORY = Path(__file__).parents[2]
FIGURES = REPOSITORY / "benchmarks" / "results" / "scaling" / "figures.json"


def made_up() -> Results:
    rates = [Rate(start=0.0, end=1.0, tokens_per_s=rate, requests_per_s=1.0) for rate in (40.0, 38.0, 41.0)]
    change = ChangeFigures(
        old_size=2, new_size=4, scale_latency_s=1.25, downtime_s=0.0, before=rates[0], during=rates[1], after=rates[2],
        during_over_before=0.95, max_gap_s=0.1, memory_peak_over_steady=0.004,
    )  # fmt: skip
    figures = Figures(
        method="elastic", requests=7, completed=6, failed=1, refused=1, aborted=0, lost_tokens=0, duplicated_tokens=0,
        ttft=Spread(count=0), tpot=Spread(count=0), max_gaps=Spread(count=6, p50=0.05, max=0.25), throughput=rates[0],
        slo_attainment=0.5, goodput=1.0, downtime_s=0.0, device_seconds=120.0, host_peak_bytes=3 * 2**30,
        device_peak_over_steady=None, changes=[change],
    )  # fmt: skip
    machine = {"date": "2026-01-01", "cpu": "abacus", "cores": 2, "memory_bytes": 2**30, "versions": {}}
    return Results(
        command="scaling", title="Title", paper="", invocation="elasticmoe bench scaling",
        machine={**machine, "load_average": [0.1]}, load_average_after=[2.0], model="tiny", workload="steady",
        slo=Slo(ttft_s=1.0, tpot_s=0.2), results=[Result(label="elastic", method="elastic", rate=3.0, figures=figures)],
    )  # fmt: skip


def test_the_block_replaces_what_stood_between_the_marks(tmp_path: Path) -> None:
    shown = tmp_path / "benchmarks.md"
    shown.write_text(f"# Above\n\n{page.BEGIN}\nold\n{page.END}\n\nbelow\n")
    for _ in range(2):
        page.write(shown, made_up(), tmp_path / "results" / "figures.png")
    text = shown.read_text()
    assert text.startswith("# Above\n") and text.endswith("\n\nbelow\n") and "\nold\n" not in text
    assert "![Title](results/figures.png)" in text and "elasticmoe bench scaling\n```" in text
    assert "| elastic | 1.25 s | 0 | 1 of 7 | 50 ms / 250 ms | 50% | 40.0 / 38.0 / 41.0 | 95% |" in text
    assert "| 3.00 GiB, +0.4% | 120 |" in text


@pytest.mark.parametrize("option", ["--page docs/benchmarks.md", "--page=x.md", "--readme README.md"])
def test_the_block_does_not_name_the_page_it_was_written_to(option: str) -> None:
    results = msgspec.structs.replace(made_up(), invocation=f"elasticmoe bench scaling {option} --rate 2")
    assert page.block(results, "p.png").startswith("```\nelasticmoe bench scaling --rate 2\n```")


def test_a_page_without_marks_is_left_alone(tmp_path: Path) -> None:
    shown = tmp_path / "benchmarks.md"
    shown.write_text("nothing\n")
    with pytest.raises(UserInputError, match="no place"):
        page.write(shown, made_up(), tmp_path / "figures.png")
    assert shown.read_text() == "nothing\n"


def test_the_page_shows_the_committed_figures() -> None:
    results = msgspec.json.decode(FIGURES.read_bytes(), type=Results)
    _, found, _ = page.between_marks((REPOSITORY / "docs" / "benchmarks.md").read_text())
    assert found == page.block(results, "../benchmarks/results/scaling/figures.png")
