"""Every device is full before and after changes 2 -> 4 -> 2: what columns leave is KV, and KV makes the room again.

Streams go on with the same tokens, cached prefixes stay, and what a change cannot fit is refused with numbers.
"""

from __future__ import annotations

import json
import random
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from elasticmoe_sglang.tiny_model import VOCAB, Arch, make_tiny_model
from tests.helpers.corpus import Case, ask
from tests.helpers.elastic import ElasticServer
from tests.helpers.load import Load, Stream
from tests.helpers.record import record

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

CHECKED = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1"}
"""SGLang's own check that every row of KV is free, cached or a request's: after each iteration, not only when idle."""
BUDGETS: dict[Arch, int] = {"qwen3_moe": 32 << 20, "deepseek_v2": 24_000_000, "gpt_oss": 38 << 20}
"""All columns and some KV do not fit one device, and at two ranks a rank has less KV than the longest request."""
TOKENS = 240
HOT = 6
"""Prompts that each rank answers again and again."""
FILLERS = 20
"""Prompts a rank answers once, more than its cache can keep."""
PROMPT = 320


@dataclass(frozen=True, kw_only=True)
class Setup:
    arch: Arch
    args: tuple[str, ...] = ()


SETUPS = (
    pytest.param(Setup(arch="qwen3_moe", args=("--page-size", "4")), id="qwen3_moe-paged"),
    pytest.param(
        Setup(arch="deepseek_v2", args=("--disable-overlap-schedule",)),
        id="deepseek_v2-no-overlap",
        marks=pytest.mark.soak,
    ),
    pytest.param(
        Setup(arch="qwen3_moe", args=("--disable-overlap-schedule",)),
        id="qwen3_moe-no-overlap",
        marks=pytest.mark.soak,
    ),
    pytest.param(Setup(arch="deepseek_v2", args=("--page-size", "16")), id="deepseek_v2-paged", marks=pytest.mark.soak),
    pytest.param(Setup(arch="gpt_oss", args=("--page-size", "4")), id="gpt_oss", marks=pytest.mark.soak),
)


class Served:
    """A server whose ranks have all of their devices, and what its requests must answer."""

    def __init__(self, name: str, server: ElasticServer, load: Load) -> None:
        self.name = name
        self.server = server
        self.load = load
        self.rng = random.Random(5)
        self.hot = {rank: [self.prompt() for _ in range(HOT)] for rank in (0, 1)}
        self.table: list[dict[str, Any]] = []

    def prompt(self, length: int = PROMPT) -> list[int]:
        return [self.rng.randrange(3, VOCAB) for _ in range(length)]

    def hit_rate(self) -> float:
        """Share of the hot prompts' tokens that their ranks had cached."""
        hits = total = 0
        for rank, prompts in self.hot.items():
            for prompt in prompts:
                answer = self.server.generate(prompt, 1, routed_dp_rank=rank)
                hits += answer["meta_info"]["cached_tokens"]
                total += len(prompt)
        return hits / total

    def fill_caches(self, ranks: Sequence[int]) -> None:
        """More new prompts than the caches can keep."""
        for rank in ranks:
            streams = [self.load.start(self.prompt(), 1, routed_dp_rank=rank) for _ in range(FILLERS)]
            self.load.wait(streams)

    def check_full(self, when: str) -> dict[int, int]:
        """Each active rank's device is full; KV tokens of each rank."""
        status = self.server.status()
        tokens = {}
        for rank in status["ranks"]:
            if rank["state"] != "active":
                continue
            device = status["memory"]["devices"][rank["device"]]
            tokens[rank["rank"]] = rank["kv_tokens"]
            share = device["used"] / device["budget"]
            row = {"when": when, "rank": rank["rank"], "kv_tokens": rank["kv_tokens"], "in_use": round(share, 4)}
            self.table.append(row | device["by_kind"])
            assert 0.97 <= share <= 1, row
        for device in status["memory"]["devices"]:
            if device["device"] not in status["membership"]:
                assert device["used"] == 0, f"device {device['device']} has no rank and is not empty"
        return tokens

    def streams(self, cases: Sequence[Case]) -> list[tuple[Stream, Case]]:
        started = [(self.load.start(case.prompt, len(case.ids)), case) for case in cases]
        for stream, _ in started:
            stream.wait_for_tokens(10, 60)
        return started


@pytest.fixture(scope="module", params=SETUPS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    setup: Setup = request.param
    folder = tmp_path_factory.mktemp("kv")
    model = make_tiny_model(folder / "model", arch=setup.arch)
    args = [*setup.args, "--elasticmoe-device-budget", str(BUDGETS[setup.arch])]
    with (
        ElasticServer(model, args, log=folder / "server.log", kv_tokens=None, env=CHECKED) as server,
        Load(server.url) as load,
    ):
        print(f"healthy after {server.boot_s:.1f} s")
        served = Served(" ".join([setup.arch, *setup.args]), server, load)
        yield served
        for row in served.table:
            print(json.dumps(row))
        log = server.log.read_text(errors="replace")
        assert "Leak Detected" not in log and "memory leak" not in log.lower()


def number(line: str, what: str) -> int:
    """The number in front of these words."""
    match = re.search(rf"(\d+) {what}", line)
    assert match is not None, line
    return int(match[1])


def peak_share(operation: dict[str, Any]) -> float:
    """The worst device's peak over the larger of its states before and after."""
    shares = [device["peak"] / max(device["before"], device["after"], 1) for device in operation["memory"]]
    return round(max(shares), 4)


def check_peaks(operation: dict[str, Any]) -> None:
    for device in operation["memory"]:
        assert device["peak"] <= 1.02 * max(device["before"], device["after"]), device
        assert device["peak"] <= device["budget"]


def test_kv_takes_and_gives_what_columns_leave_and_need(served: Served) -> None:
    server = served.server
    cases = ask(served.load, [served.prompt(40) for _ in range(8)], TOKENS)
    assert len(cases) >= 4
    small = served.check_full("2 ranks")
    served.hit_rate()
    before = served.hit_rate()
    assert before > 0.9

    streams = served.streams(cases)
    up = server.must_scale(4)
    large = served.check_full("2 -> 4")
    check_peaks(up)
    assert all(large[rank] > 1.2 * small[rank] for rank in small), "departed columns became KV"
    after_up = served.hit_rate()
    for stream, case in streams:
        stream.wait(120).check(case.ids)

    served.fill_caches(sorted(large))
    served.hit_rate()  # what is asked for often is not what goes
    streams = served.streams(cases)
    down = server.must_scale(2)
    final = served.check_full("4 -> 2")
    check_peaks(down)
    assert final == small, "the same share of the same weights"
    after_down = served.hit_rate()
    for stream, case in streams:
        stream.wait(120).check(case.ids)
    moved = [stream for stream, _ in streams if len(stream.ranks) > 1]
    assert moved, "no stream was on a rank that left"
    migrated = server.log_lines("migrated")
    assert migrated and all(number(line, "requests") == number(line, "with their KV") for line in migrated), migrated

    figures = {
        "kv_tokens": {"2 ranks": small, "2 -> 4": large, "4 -> 2": final},
        "least_of_a_device_in_use": min(row["in_use"] for row in served.table),
        "peak_over_larger_state": max(peak_share(up), peak_share(down)),
        "hit_rate": {"before": before, "after_up": after_up, "after_down": after_down},
        "moved_requests": down["moved_requests"],
        "pause_ms": {"up": up["max_pause_ms"], "down": down["max_pause_ms"]},
        "total_ms": {"up": up["timings"]["total_ms"], "down": down["timings"]["total_ms"]},
    }
    print(json.dumps(figures))
    record("kv-elastic", served.name, figures)
    assert after_up >= 0.95 * before and after_down >= 0.95 * before


def test_what_cannot_fit_is_refused_with_numbers(served: Served) -> None:
    """One rank would have to hold all columns and some KV."""
    before = served.check_full("before the refusal")
    answer = served.server.post("/scale_elastic_ep", {"new_ep_size": 1, "wait": True})
    assert answer.status_code == 400
    assert "device 0 needs" in answer.text and "free of" in answer.text, answer.text
    assert served.check_full("after the refusal") == before


def test_running_requests_wait_when_nothing_else_is_left_and_lose_nothing(served: Served) -> None:
    """The survivors have less than is in use there: some requests wait again, one that moves there has its KV computed
    again, which is counted, and all end with their tokens."""
    server = served.server
    small = served.check_full("2 ranks")
    server.must_scale(4)
    most = max(small.values())
    prompts = [served.prompt(most // 6) for _ in range(12)]
    cases = ask(served.load, prompts, 100)
    assert len(cases) >= 8
    running = {rank: [served.rng.choice(cases) for _ in range(count)] for rank, count in ((0, 7), (1, 7), (2, 1))}
    started = [
        (served.load.start(case.prompt, 100, routed_dp_rank=rank, extra_key=uuid.uuid4().hex), case)
        for rank, chosen in running.items()
        for case in chosen
    ]
    for stream, _ in started:
        stream.wait_for_tokens(1, 120)
    in_use = [rank["kv_used"] for rank in server.status()["ranks"][:2]]
    down = server.must_scale(2, recomputes=True)
    for stream, case in started:
        stream.wait(240).check(case.ids)
    retracted = [number(line, "requests retracted") for line in server.log_lines("requests retracted")]
    print(json.dumps({"in_use": in_use, "left": most, "retracted": retracted, "pause_ms": down["max_pause_ms"]}))
    assert max(in_use) > most, "there was room for all"
    assert sum(retracted) > 0
    assert (down["moved_requests"], down["recomputed_requests"]) == (1, 1)
    assert served.check_full("4 -> 2") == small


def test_a_request_that_needs_the_room_keeps_it(served: Served) -> None:
    """At four ranks a request may take more than a rank has at two: the change is undone, and the request ends well."""
    server = served.server
    small = served.check_full("2 ranks")
    server.must_scale(4)
    large = served.check_full("2 -> 4")
    wanted = min(max(small.values()) + 200, min(large.values()) - 64)
    assert wanted > max(small.values())
    long = served.load.start(served.prompt(1500), wanted - 1540, routed_dp_rank=0).wait_for_tokens(20, 60)
    refused = server.scale(2)
    assert refused["phase"] == "rolled_back" and "may need" in refused["error"], refused
    assert served.check_full("undone") == large
    served.load.abort(long)
    long.wait(60).check()
    server.must_scale(2)
    assert served.check_full("4 -> 2") == small
