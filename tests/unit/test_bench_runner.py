"""A whole run with a method that needs no server: an open loop, nothing dropped, and what is written about it."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling.experiments import COMMANDS
from benchmarks.scaling.main import main
from benchmarks.scaling.methods import METHODS, NO_SERVER, Method, MethodFailed, Static
from benchmarks.scaling.records import (
    ChangeRecord,
    DevicePeak,
    Holding,
    MemorySample,
    RequestRecord,
    RunLog,
    Token,
    read_log,
    write_log,
)
from benchmarks.scaling.report import describe_workload, targets
from benchmarks.scaling.runner import RunPlan, run
from benchmarks.scaling.schedule import Schedule
from benchmarks.scaling.servers import ServerSettings
from benchmarks.scaling.workload import Lengths, Workload
from benchmarks.streams import StreamRecord
from elasticmoe_sglang.cli.main import main as elasticmoe

SETTINGS = ServerSettings(model="none", device="cpu", kv_tokens=1, log_dir=Path())


class Pretend(Method):
    """Answers after 50 ms, one token each 10 ms; during a change of 300 ms there is no server."""

    name = "pretend"

    async def start(self, size: int) -> None:
        self.sizes = size
        self.up = True
        self.most_at_once = self.at_once = 0

    @property
    def size(self) -> int:
        return self.sizes

    async def ask(self, record: StreamRecord) -> int:
        if not self.up:
            record.failure, record.ended_at = NO_SERVER, time.monotonic()
            return -1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.04)
        for token in range(record.ask.tokens):
            await asyncio.sleep(0.01)
            record.token_ids.append(token)
            record.arrivals.append(time.monotonic())
        record.ended_at = time.monotonic()
        self.at_once -= 1
        return 0 if self.sizes == 2 else 1

    async def apply_commit(self, size: int, record: ChangeRecord) -> None:
        self.up = False
        await asyncio.sleep(0.3)
        if size == 9:
            raise MethodFailed("nine is too many")
        self.up, self.sizes = True, size
        record.generation, record.effective_at = 1, self.clock.now()


def pretend(changes: str, duration: float) -> tuple[Pretend, RunLog]:
    workload = Workload(rate=50, even=True, output=Lengths(low=5, high=5))
    plan = RunPlan(
        workload=workload, schedule=Schedule.parse(2, changes), duration_s=duration, settle_s=0.3, sample_s=0.2
    )
    method = Pretend(SETTINGS, 4)
    return method, asyncio.run(run(method, plan))


def test_requests_are_sent_when_they_are_due() -> None:
    method, log = pretend("", 1.0)
    assert len(log.requests) == pytest.approx(50, abs=2)
    assert all(request.error is None and len(request.tokens) == 5 for request in log.requests)
    assert method.most_at_once > 2, "an open loop does not wait for answers"
    late = [request.sent_at - request.due_at for request in log.requests]
    assert min(late) >= -0.002 and sorted(late)[len(late) // 2] < 0.05


def test_refused_requests_stay_in_the_log_and_the_load_goes_on_after_the_change() -> None:
    _, log = pretend("0.3:4", 0.5)
    refused = [request for request in log.requests if request.error == NO_SERVER]
    assert refused and all(not request.tokens and request.generation == -1 for request in refused)
    [change] = log.changes
    assert change.error is None and change.effective_at is not None
    # 0.3 s, the change, and 0.3 s to settle: longer than the duration asked for.
    assert log.load_ended_at == pytest.approx(0.9, abs=0.2)
    assert any(request.generation == 1 and request.error is None for request in log.requests)


def test_a_change_that_fails_is_reported_and_ends_the_schedule() -> None:
    _, log = pretend("0.1:9,0.5:4", 0.6)
    [change] = log.changes
    assert change.effective_at is None and change.error is not None and "nine" in change.error


def test_logs_are_read_back(tmp_path: Path) -> None:
    _, log = pretend("", 0.2)
    write_log(tmp_path / "log.json", log)
    assert read_log(tmp_path / "log.json") == log


def test_static_serves_at_the_largest_size() -> None:
    assert set(METHODS) == set(COMMANDS["scaling"].methods)
    assert METHODS["static"] is Static


def made_up(method: str, latency: float | None, refused: int) -> RunLog:
    """60 s, a token each 50 ms; the change at 20 s takes `latency` seconds, in which a restart serves nothing."""
    requests = []
    for second in range(60):
        down = refused and latency is not None and 20 <= second < 20 + latency
        tokens = [] if down else [Token(second + i / 20, i, i) for i in range(16)]
        requests.append(
            RequestRecord(
                request_id=second, due_at=second - 0.1, sent_at=second - 0.1, prompt_tokens=1, wanted=16,
                tokens=tokens, ended_at=second + 0.8, error="refused" if down else None,
                generation=1 if latency and second >= 20 + latency else 0,
            )
        )  # fmt: skip
    changes = []
    if latency is not None:
        done = 20 + latency
        changes = [
            ChangeRecord(
                requested_at=20.0, old_size=2, new_size=4, generation=0 if method == "elastic" else 1,
                effective_at=done - 0.05, ended_at=done,
            )
        ]  # fmt: skip
    return RunLog(
        method=method, load_ended_at=60.0, ended_at=61.0, requests=requests, changes=changes,
        memory=[MemorySample(float(t), 2**30) for t in range(60)], holdings=[Holding(0.0, 2), Holding(20.0, 4)],
        device_memory=[DevicePeak(device=0, before=100, peak=101, after=90)] if method == "elastic" else [],
        about={
            "machine": {**_MACHINE}, "invocation": "elasticmoe bench scaling", "load_average_after": [2.0],
            "workload": describe_workload(COMMANDS["scaling"]),
        },
    )  # fmt: skip


_MACHINE = {
    "date": "2026-01-01", "cpu": "abacus", "cores": 2, "memory_bytes": 2**30, "python": "3", "versions": {},
    "load_average": [0.1, 0.1, 0.1],
}  # fmt: skip


def test_report_picture_and_figures_from_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = {"elastic": (1.0, 0), "cold-restart": (30.0, 1), "replica": (25.0, 0), "colocated": (28.0, 0)}
    for method, (latency, refused) in logs.items():
        write_log(tmp_path / "logs" / f"{method}.json", made_up(method, latency, refused))
    write_log(tmp_path / "logs" / "static.json", made_up("static", None, 0))
    assert elasticmoe(["bench", "scaling", "--again", "--out", str(tmp_path)]) == 0
    report = (tmp_path / "report.md").read_text()
    assert report in capsys.readouterr().out
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [result["label"] for result in results] == list(COMMANDS["scaling"].methods)
    assert "abacus" in report and "| yes |" in report and "**no**" not in report
    assert "1.00 s, 0.040 of replica's 25.00 s" in report
    assert "Written by `elasticmoe bench scaling` on" in report, "the command that measured, not the one that drew"
    cold = next(result["figures"] for result in results if result["label"] == "cold-restart")
    assert cold["refused"] == 30 and cold["downtime_s"] == pytest.approx(50.0 - 19.75, abs=0.001)


def test_only_missing_cases_run_and_none_of_another_workload_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Pretend):
        name = "replica"

    monkeypatch.setitem(METHODS, "replica", Second)
    write_log(tmp_path / "logs" / "elastic.json", made_up("elastic", 1.0, 0))
    words = ["bench", "scaling", "--resume", "--methods", "elastic,replica", "--out", str(tmp_path)]
    assert elasticmoe([*words, "--rate", "50"]) == 2
    assert "another workload" in capsys.readouterr().err
    log = made_up("elastic", 1.0, 0)
    short = replace(COMMANDS["scaling"], changes="0.3:4", rate=50.0)
    log.about["workload"] = describe_workload(short)
    write_log(tmp_path / "logs" / "elastic.json", log)
    short_words = ["--changes", "0.3:4", "--rate", "50", "--duration", "0.5", "--settle", "0.3"]
    assert elasticmoe([*words, *short_words]) == 0
    assert read_log(tmp_path / "logs" / "elastic.json") == log, "it has not run again"
    assert read_log(tmp_path / "logs" / "replica.json").requests


def test_a_missed_target_shows(tmp_path: Path) -> None:
    from benchmarks.scaling.analyser import analyse
    from benchmarks.scaling.report import Result

    slo = COMMANDS["scaling"].slo
    slow, other = made_up("elastic", 20.0, 1), made_up("replica", 25.0, 0)
    found = targets(
        [
            Result(label=log.method, method=log.method, rate=1.0, figures=analyse(log, slo, window_s=15))
            for log in (slow, other)
        ]
    )
    missed = {target.name for target in found if not target.met}
    assert missed == {"downtime", "failed requests", "throughput during / before", "scale latency"}


def test_impossible_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path)]
    assert elasticmoe(["bench", "scaling", "--methods", "magic", *out]) == 2
    assert elasticmoe(["bench", "table3", "--again", *out]) == 2
    assert elasticmoe(["bench", "scaling", "--rate", "0", *out]) == 2
    assert "magic" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["nothing"])
