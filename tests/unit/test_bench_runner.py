"""Whole sessions with a method that needs no server: loads, changes, nothing dropped, and what is written about it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from benchmarks.scaling import main as bench
from benchmarks.scaling.clock import Clock
from benchmarks.scaling.experiments import EXPERIMENTS, Arm, Experiment, Run
from benchmarks.scaling.groups import Group
from benchmarks.scaling.methods import METHODS, NO_SERVER, Method, MethodFailed
from benchmarks.scaling.records import ChangeRecord, Load, MemorySample, RequestRecord, RunLog, read_log, write_log
from benchmarks.scaling.report import BEGIN, END, between_marks, write_block
from benchmarks.scaling.runner import capacity_of, carry_out, make_plan
from benchmarks.scaling.servers import ServerSettings
from benchmarks.streams import StreamRecord
from elasticmoe_sglang.cli.main import main as elasticmoe
from elasticmoe_sglang.errors import UserInputError

SETTINGS = ServerSettings(model="none", device="cpu", kv_tokens=1, log_dir=Path())
EXPERIMENT = Experiment(title="Pretended", paper="", arms=(), output="5", lanes=4, seconds=0.4, window_s=0.4)


class Pretend(Method):
    """Answers after 40 ms, one token each 10 ms; during a change of 300 ms there is no server."""

    name = "elastic"

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
        return 0 if self.sizes == 1 else 1

    async def apply_commit(self, size: int, record: ChangeRecord) -> None:
        self.up = False
        await asyncio.sleep(0.3)
        if size == 9:
            raise MethodFailed("nine is too many")
        self.up, self.sizes = True, size
        record.generation, record.effective_at = 1, self.clock.now()


CLOSED = Run(name="closed loop at 1", sizes=(1,))


def session(*runs: Run, repetition: int = 0) -> tuple[Pretend, list[RunLog]]:
    method, logs = Pretend(SETTINGS, 2), []
    arm = Arm(name="elastic", method="elastic", runs=runs)
    asyncio.run(
        carry_out(EXPERIMENT, arm, repetition, method, group=None, about={}, say=lambda text: None, keep=logs.append)
    )
    return method, logs


@pytest.mark.process
def test_a_closed_loop_waits_for_answers_and_measures_the_capacity() -> None:
    method, [log] = session(CLOSED)
    assert method.most_at_once == 4
    assert log.load == Load(lanes=4) and not log.changes
    assert all(len(request.arrivals) == 5 for request in log.requests)
    _, [_, sized] = session(CLOSED, Run(name="open", sizes=(1, 1), share=0.5))
    # Four lanes, a request takes 90 ms and, on a busy machine, more.
    assert 0 < sized.capacity[1] < 1.1 * 4 / 0.09
    assert sized.load.rate == pytest.approx(sized.capacity[1] / 2, abs=0.01)


@pytest.mark.process  # seconds of pretended load
def test_an_open_loop_sends_when_requests_are_due() -> None:
    method, [_, log] = session(CLOSED, Run(name="open", sizes=(1, 1), share=1.5, seconds=0.8))
    assert method.most_at_once > 4, "an open loop does not wait for answers"
    late = sorted(request.sent_at - request.due_at for request in log.requests)
    assert late[0] >= -0.002 and late[len(late) // 2] < 0.05
    [nothing] = log.changes
    assert nothing.old_size == nothing.new_size and nothing.ended_at - nothing.requested_at > 0.9


@pytest.mark.process  # seconds of pretended load
def test_refused_requests_stay_in_the_log_and_the_load_goes_on_after_the_change() -> None:
    _, [_, log] = session(CLOSED, Run(name="up", sizes=(1, 2), share=0.8))
    refused = [request for request in log.requests if request.error == NO_SERVER]
    assert refused and all(not request.arrivals and request.generation == -1 for request in refused)
    [change] = log.changes
    assert change.error is None and change.effective_at is not None
    assert log.load_ended_at == pytest.approx(0.4 + 0.3 + 0.4, abs=0.2)
    assert any(request.generation == 1 and request.error is None for request in log.requests)


@pytest.mark.process  # seconds of pretended load
def test_a_change_that_fails_is_reported_and_ends_the_run() -> None:
    _, [log] = session(Run(name="up", sizes=(1, 9, 2)))
    [change] = log.changes
    assert change.effective_at is None and change.error is not None and "nine" in change.error


@pytest.mark.process  # seconds of pretended load
def test_runs_are_shuffled_by_the_repetition_and_capacities_come_first() -> None:
    runs = [Run(name=str(number), sizes=(1,), share=0.5, seconds=0.01) for number in range(3)]
    orders = {tuple(log.run for log in session(*runs, CLOSED, repetition=number)[1]) for number in (0, 1, 2, 2)}
    assert 2 <= len(orders) <= 3 and all(order[0] == CLOSED.name for order in orders)


@pytest.mark.process
def test_equal_repetitions_ask_the_same() -> None:
    run = Run(name="open", sizes=(1, 2), share=0.5)
    one, same, other = (
        make_plan(EXPERIMENT, run, repetition, {1: capacity}).workload.arrivals()
        for repetition, capacity in ((3, 2.0), (3, 8.0), (4, 2.0))
    )
    prompts = [[next(arrivals).prompt for _ in range(5)] for arrivals in (one, same, other)]
    assert prompts[0] == prompts[1] != prompts[2]


def closed(lanes: int, ended_at: float) -> RunLog:
    """Each lane's first request takes ten seconds, later ones one; tokens come at the end."""
    requests = []
    for lane in range(lanes):
        at = 10.0 + lane / 100
        requests.append((0.0, at))
        while at + 1 <= ended_at:
            requests.append((at, at + 1))
            at += 1
    return msgspec.structs.replace(
        made_up("elastic", "closed loop at 1", 0), load=Load(lanes=lanes), load_ended_at=ended_at, changes=[],
        requests=[
            RequestRecord(
                request_id=number, due_at=sent, sent_at=sent, wanted=10, token_ids=list(range(10)), ended_at=end,
                arrivals=[end - 0.01] * 10, error=None,
            )
            for number, (sent, end) in enumerate(requests)
        ],
    )  # fmt: skip


def test_a_capacity_does_not_count_the_prompts_that_start_together() -> None:
    """16 lanes once had a capacity of 0.02 requests a second, because the run ended with their first prompts."""
    assert capacity_of(closed(lanes=4, ended_at=40.0)) == pytest.approx(4.0, rel=0.05)


def test_a_run_that_is_too_short_has_no_capacity() -> None:
    with pytest.raises(MethodFailed, match="4 requests of 4 lanes ended in 10 s"):
        capacity_of(closed(lanes=4, ended_at=10.5))


def test_a_closed_loop_lasts_until_each_lane_has_had_some_requests() -> None:
    _, [log] = session(Run(name="closed loop at 1", sizes=(1,), seconds=0.05))
    assert sum(request.ended_at <= log.load_ended_at for request in log.requests) >= 4 * 4


def made_up(arm: str, run: str, repetition: int, *, failed: bool = False) -> RunLog:
    """20 s at two requests a second, a token each 50 ms; at 10 s a change of one second."""
    requests = [
        RequestRecord(
            request_id=number, due_at=number / 2, sent_at=number / 2, wanted=16,
            arrivals=[number / 2 + 0.1 + place / 20 for place in range(16)], token_ids=list(range(16)),
            ended_at=number / 2 + 0.9, error="gone" if failed and number == 20 else None,
        )
        for number in range(40)
    ]  # fmt: skip
    change = ChangeRecord(requested_at=10.0, old_size=1, new_size=2, effective_at=10.9, ended_at=11.0)
    machine = {
        "date": "2026-01-01", "commit": "abc", "tree_clean": True, "cpu": "abacus", "cores": 2, "governor": "slow",
        "memory_bytes": 2**30, "versions": {"torch": "2"}, "load_average": [0.1, 0.1, 0.1],
    }  # fmt: skip
    return RunLog(
        arm=arm, run=run, repetition=repetition, method=arm, load=Load(rate=2.0, share=0.8), load_ended_at=20.0,
        ended_at=21.0, requests=requests, changes=[change], memory=[MemorySample(t / 4, 2**30) for t in range(80)],
        busy_cores={"servers": 1.5, "client": 0.1, "others": 0.01, "stolen": 0.0},
        about={"machine": machine, "model": "tiny", "invocation": "elasticmoe bench scale"},
    )  # fmt: skip


@pytest.mark.process
def test_logs_are_read_back_as_they_were_rounded(tmp_path: Path) -> None:
    log = made_up("elastic", "up at 0.8", 0)
    log.requests[0].ended_at = 1.23456789
    write_log(tmp_path / "log.json.xz", log)
    read = read_log(tmp_path / "log.json.xz")
    assert read.requests[0].ended_at == 1.2346 and read.requests[7].token_ids == log.requests[7].token_ids
    write_log(tmp_path / "log.json.xz", read)
    assert read_log(tmp_path / "log.json.xz") == read


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing imports matplotlib, which may list the machine's fonts in a process of its own."""
    monkeypatch.setattr(bench, "draw", lambda logs, path: None)


def results(folder: Path, **fields: bool) -> Path:
    for repetition in range(3):
        log = made_up("elastic", "up at 0.8", repetition, **fields)
        write_log(folder / "scale" / "logs" / "elastic" / f"up-at-0.8-{repetition}.json.xz", log)
    return folder / "scale"


@pytest.mark.process
def test_figures_report_and_picture_come_from_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = results(tmp_path)
    assert elasticmoe(["bench", "scale", "--again", "--out", str(out)]) == 1, "what was not measured is missed"
    said = capsys.readouterr()
    report = (out / "report.md").read_text()
    assert report in said.out and (out / "figures.png").read_bytes().startswith(b"\x89PNG")
    assert "missed: tokens/s after one rank more" in said.err and "missed: failed requests" in said.err
    assert "missed: failed requests, all repetitions, up at 0.8:" not in said.err
    for words in ("commit abc;", "abacus, 2 cores, governor slow", "others used 0.01 cores", "0 of 0", "| met |"):
        assert words in report, words
    assert "| elastic: up at 0.8 | 0.90 s [0.90 s, 0.90 s] | 1.00 s [1.00 s, 1.00 s] |" in report


@pytest.mark.process
@pytest.mark.usefixtures("undrawn")
def test_a_failure_in_any_repetition_is_a_missed_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elasticmoe(["bench", "scale", "--again", "--out", str(results(tmp_path, failed=True))])
    assert "missed: failed requests, all repetitions, up at 0.8: 1, n = 3, wanted at most 0" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.usefixtures("undrawn")
def test_figures_that_are_not_those_of_their_logs_are_found(tmp_path: Path) -> None:
    out = results(tmp_path)
    elasticmoe(["bench", "scale", "--again", "--out", str(out)])
    assert bench.differences(tmp_path) == []
    log = made_up("elastic", "up at 0.8", 1)
    log.requests[20].arrivals = [at + 0.02 for at in log.requests[20].arrivals]
    write_log(out / "logs" / "elastic" / "up-at-0.8-1.json.xz", log)
    assert bench.differences(tmp_path) == ["scale"]
    elasticmoe(["bench", "scale", "--again", "--out", str(out)])
    (out / "report.md").write_text("better than it was")
    assert bench.differences(tmp_path) == ["scale"]


@pytest.mark.process
def test_every_committed_figure_is_reproduced_from_its_log() -> None:
    assert bench.differences(bench.RESULTS) == []


@pytest.mark.process
def test_the_pages_show_the_committed_figures() -> None:
    for page, text in bench.pages(bench.committed(bench.RESULTS)).items():
        assert between_marks(page.read_text())[1] == text.strip(), f"{page.name}: run `elasticmoe bench report`"


@pytest.mark.process
def test_the_block_replaces_what_stood_between_the_marks(tmp_path: Path) -> None:
    shown = tmp_path / "page.md"
    shown.write_text(f"# Above\n\n{BEGIN}\nold\n{END}\n\nbelow\n")
    for _ in range(2):
        write_block(shown, "new\n")
    assert shown.read_text() == f"# Above\n\n{BEGIN}\nnew\n{END}\n\nbelow\n"
    shown.write_text("nothing\n")
    with pytest.raises(UserInputError, match="no place"):
        write_block(shown, "new")
    assert shown.read_text() == "nothing\n"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.process  # seconds of pretended load
def test_only_what_is_missing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --resume; and what one session has found is kept when a later one fails."""
    arms = (Arm(name="elastic", method="elastic", runs=(CLOSED,)),)
    monkeypatch.setitem(EXPERIMENTS, "scale", replace(EXPERIMENT, arms=arms, seconds=0.1))
    monkeypatch.setitem(METHODS, "elastic", Pretend)
    monkeypatch.setattr(bench, "make_tiny_model", lambda path, **_: path)
    monkeypatch.setattr(bench.machine, "describe", lambda: made_up("", "", 0).about["machine"])
    monkeypatch.setattr(bench, "Group", lambda: Group(tmp_path / "none"))
    words = ["bench", "scale", "--out", str(tmp_path), "--repetitions"]
    elasticmoe([*words, "1"])
    first = tmp_path / "logs" / "elastic" / "closed-loop-at-1-0.json.xz"
    before = first.read_bytes()
    elasticmoe([*words, "2", "--resume", "--within", "0"])
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    elasticmoe([*words, "2", "--resume"])
    assert first.read_bytes() == before and len(list(first.parent.iterdir())) == 2
    elasticmoe([*words, "1"])
    assert len(list(first.parent.iterdir())) == 1, "without --resume what was measured before is gone"


@pytest.mark.process
def test_impossible_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert elasticmoe(["bench", "scale", "--again", "--out", str(tmp_path)]) == 2
    assert "no logs" in capsys.readouterr().err
    for words in (["nothing"], ["scale", "--arms", "magic"]):
        with pytest.raises(SystemExit):
            bench.main(words)


@pytest.mark.process
@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_s_memory_and_time(version: int, tmp_path: Path) -> None:
    if version == 1:
        (tmp_path / "memory").mkdir()
        (tmp_path / "cpuacct").mkdir()
    group = Group(tmp_path)
    for folder in {group._memory, group._cpu}:
        folder.mkdir()
    fields = "total_rss 100\ntotal_shmem 20\nrss 1\n" if version == 1 else "anon 100\nfile 7\nshmem 20\n"
    (group._memory / "memory.stat").write_text("cache 5\n" + fields)
    if version == 1:
        (group._cpu / "cpuacct.usage").write_text("1500000000\n")
    else:
        (group._cpu / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    assert group.memory_bytes() == 120 and group.cpu_s() == 1.5

    async def sampled() -> list[MemorySample]:
        found: list[MemorySample] = []
        sampler = asyncio.create_task(group.sample(Clock(), found))
        await asyncio.sleep(0.5)
        sampler.cancel()
        return found

    found = asyncio.run(sampled())
    assert len(found) >= 3 and found[-1].host_bytes == 120


@pytest.mark.process
def test_methods_are_those_of_the_experiments() -> None:
    used = {arm.method for experiment in EXPERIMENTS.values() for arm in experiment.arms}
    assert used == set(METHODS) and all(method.name == name for name, method in METHODS.items())
