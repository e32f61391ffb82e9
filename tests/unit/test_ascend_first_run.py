"""The report of the first run on NPUs: a step that fails, hangs or cannot start is in it, and the next one runs."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import msgspec
import pytest

from benchmarks import ascend_first_run
from benchmarks.ascend_first_run import Step, run, steps

pytestmark = pytest.mark.process
PAGE = Path(__file__).parents[2] / "docs/ascend-first-run.md"


def test_every_step_is_on_the_page_in_its_order(tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE) == [step.name for step in steps(tmp_path, 2)]


def test_how_steps_end() -> None:
    ok = run(
        Step(name="ok", asks="", arguments=("-c", "import os; print(os.environ['GIVEN'])"), variables={"GIVEN": "a"})
    )
    assert ok.passed and ok.status == 0 and ok.output == "a"
    failed = run(Step(name="failed", asks="", arguments=("-c", "raise SystemExit('no NPU')")))
    assert not failed.passed and failed.status == 1 and "no NPU" in failed.output
    absent = run(Step(name="absent", asks="", program=("there-is-no-such-program",)))
    assert not absent.passed and absent.status is None and "cannot be started" in absent.output


def test_a_step_that_hangs_is_killed_with_what_it_started() -> None:
    starts = "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    child = f"import subprocess, sys; print('begun', flush=True); {starts}"
    began = time.monotonic()
    hung = run(Step(name="hung", asks="", arguments=("-c", child), limit_s=3))
    assert time.monotonic() - began < 15
    assert not hung.passed and hung.status is None and hung.output.splitlines() == ["begun", "", "killed after 3 s"]


def test_the_report_is_written_after_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    looks = f"import pathlib; print(pathlib.Path({str(out / 'report.json')!r}).exists())"
    chosen = [Step(name=name, asks="?", arguments=("-c", looks)) for name in ("first", "second")]
    monkeypatch.setattr(ascend_first_run, "steps", lambda *_: chosen)
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out)])
    assert ascend_first_run.main() == 0
    report = msgspec.json.decode((out / "report.json").read_bytes())
    assert [step["output"] for step in report["steps"]] == ["False", "True"] and report["machine"]["cores"]
    assert "2 of 2 steps passed" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(out), "--only", "third"])
    with pytest.raises(SystemExit):
        ascend_first_run.main()
    assert "no such step: third; there are first, second" in capsys.readouterr().err
