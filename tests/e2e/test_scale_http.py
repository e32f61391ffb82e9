"""The HTTP contract and the `elasticmoe` command, on the real server with an admin key."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.footprint import loads_of
from tests.helpers.load import settled
from tests.helpers.shared import EXPERTS, KEY, Shared

pytestmark = [pytest.mark.server, pytest.mark.shared("steady"), pytest.mark.timeout(300)]

PROMPT = [5, 6, 7, 8]


@pytest.fixture
def two_ranks(shared: Shared) -> ElasticServer:
    """The server with ranks 0 and 1 active, whatever the test before has left."""
    return shared.steady()


@pytest.fixture
def server(two_ranks: ElasticServer) -> ElasticServer:
    return two_ranks


@pytest.fixture
def model(two_ranks: ElasticServer) -> Path:
    return Path(two_ranks.args[1])


def scale(server: ElasticServer, body: object) -> requests.Response:
    return server.post("/scale_elastic_ep", body)


def test_a_change_is_accepted_and_can_be_followed(two_ranks: ElasticServer) -> None:
    asked_at = time.time()
    response = scale(two_ranks, {"new_ep_size": 3})
    assert response.status_code == 200
    accepted = response.json()
    assert accepted["phase"] in ("planned", "preparing") and accepted["error"] is None
    assert accepted["target"] == {"new_ep_size": 3}
    assert (accepted["old_ep_size"], accepted["new_ep_size"]) == (2, 3)
    assert (accepted["joining"], accepted["retiring"]) == ([2], [])
    assert accepted["columns_planned"] == len(accepted["moves"]) == EXPERTS // 3
    assert accepted["created_at"] == pytest.approx(asked_at, abs=5)

    seen = {accepted["phase"]}
    while (operation := two_ranks.operation(accepted["operation_id"]))["phase"] != "done":
        assert operation["error"] is None
        seen.add(operation["phase"])
        time.sleep(0.01)
    assert "preparing" in seen
    timings = operation["timings"]
    parts = sum(timings[f"{phase}_ms"] for phase in ("planned", "preparing", "committing", "finishing"))
    assert parts == pytest.approx(timings["total_ms"], abs=1)
    column_bytes = two_ranks.status()["memory"]["column_bytes"]
    assert operation["columns_moved"] == operation["columns_planned"]
    assert operation["bytes_moved"] >= operation["columns_moved"] * column_bytes

    listed = two_ranks.get("/elastic_ep/operations").json()["operations"]
    assert listed[0] == operation
    assert [entry["created_at"] for entry in listed] == sorted((entry["created_at"] for entry in listed), reverse=True)


def test_waiting_gives_the_ended_operation(two_ranks: ElasticServer) -> None:
    response = scale(two_ranks, {"new_ep_size": 1, "wait": True})
    assert response.status_code == 200
    operation = response.json()
    assert operation["phase"] == "done" and operation["retiring"] == [1]
    assert operation["target"] == {"new_ep_size": 1}


def test_a_fulfilled_target_is_done_at_once(two_ranks: ElasticServer) -> None:
    epoch = two_ranks.status()["epoch"]
    response = scale(two_ranks, {"new_ep_size": 2})
    assert response.status_code == 200
    assert response.json()["phase"] == "done" and response.json()["columns_planned"] == 0
    assert two_ranks.status()["epoch"] == epoch


def test_one_change_at_a_time_and_none_twice(two_ranks: ElasticServer) -> None:
    body = {"new_ep_size": 4, "operation_id": f"grow-{time.time_ns()}"}
    first = scale(two_ranks, body)
    assert first.status_code == 200 and first.json()["phase"] in ("planned", "preparing")
    other = scale(two_ranks, {"new_ep_size": 1})
    assert other.status_code == 409
    assert "EP size 4" in other.json()["error"] and body["operation_id"] in other.json()["error"]
    again = scale(two_ranks, body)
    assert again.status_code == 200 and again.json()["operation_id"] == body["operation_id"]
    assert again.json()["created_at"] == first.json()["created_at"]
    changed_mind = scale(two_ranks, {**body, "new_ep_size": 3})
    assert changed_mind.status_code == 409 and "another target" in changed_mind.json()["error"]

    done = scale(two_ranks, {**body, "wait": True})
    assert done.status_code == 200 and done.json()["phase"] == "done"
    epoch = two_ranks.status()["epoch"]
    assert scale(two_ranks, body).json()["operation_id"] == body["operation_id"]
    assert two_ranks.status()["epoch"] == epoch, "the same operation was carried out twice"


IMPOSSIBLE: list[tuple[object, str]] = [
    ({"new_ep_size": 0}, "positive integer"),
    ({"new_ep_size": -1}, "positive integer"),
    ({"new_ep_size": RANKS + 1}, "4"),
    ({"new_ep_size": "3"}, "positive integer"),
    ({"new_ep_size": 2.5}, "positive integer"),
    ({"new_ep_size": True}, "positive integer"),
    ({"new_ep_size": None}, "positive integer"),
    ({"new_data_parallel_size": RANKS + 1}, "4"),
    ({"retire_ranks": [0]}, "0"),
    ({"retire_ranks": [3]}, "3"),
    ({"retire_ranks": [9]}, "9"),
    ({"retire_ranks": [1, 1]}, "once|twice"),
    ({"retire_ranks": []}, "retire"),
    ({"retire_ranks": "1"}, "list of rank numbers"),
    ({"retire_ranks": [1], "new_ep_size": 1}, "together"),
    ({}, "new_ep_size"),
    ([], "JSON object"),
    ("3", "JSON object"),
    ({"new_ep_size": 3, "wait": "yes"}, "true or false"),
    ({"new_ep_size": 3, "operation_id": "a b"}, "operation_id"),
    ({"new_ep_size": 3, "operation_id": 7}, "operation_id"),
    ({"restore_ranks": [1]}, "not inactive"),
    ({"force": True}, "neither a size"),
    ({"new_ep_size": 3, "operation_id": "x" * 20_000}, "larger than"),
]


@pytest.mark.parametrize(("body", "words"), IMPOSSIBLE, ids=lambda value: json.dumps(value)[:40])
def test_the_impossible_is_refused_with_a_sentence(two_ranks: ElasticServer, body: object, words: str) -> None:
    import re

    operations = two_ranks.get("/elastic_ep/operations").json()
    response = scale(two_ranks, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert re.search(words, error), error
    assert two_ranks.get("/elastic_ep/operations").json() == operations, "a refused request started something"


def test_what_is_not_json_is_refused(two_ranks: ElasticServer) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[" * 5000):
        response = requests.post(
            two_ranks.url + "/scale_elastic_ep", data=content, headers=two_ranks.headers, timeout=30
        )
        assert response.status_code == 400 and "not JSON" in response.json()["error"], content


def test_an_unknown_operation_is_not_found(server: ElasticServer) -> None:
    response = server.get("/elastic_ep/operations/never-heard-of")
    assert response.status_code == 404 and "never-heard-of" in response.json()["error"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/scale_elastic_ep"),
        ("GET", "/elastic_ep/status"),
        ("GET", "/elastic_ep/operations"),
        ("GET", "/elastic_ep/operations/x"),
        ("GET", "/is_scaling_elastic_ep"),
        ("POST", "/is_scaling_elastic_ep"),
    ],
)
def test_the_admin_key_is_asked_for(server: ElasticServer, method: str, path: str) -> None:
    epoch = server.status()["epoch"]
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}):
        response = requests.request(method, server.url + path, json={"new_ep_size": 3}, headers=headers, timeout=30)
        assert response.status_code == 401, f"{headers}: {response.text}"
    assert server.status()["epoch"] == epoch
    assert server.status()["running"] is None


def test_status_tells_what_is_there(two_ranks: ElasticServer) -> None:
    two_ranks.must_scale(3)
    settled(lambda: any(rank["state"] == "standby" for rank in two_ranks.status()["ranks"]), 30, "a new standby")
    status = two_ranks.status()
    assert (status["ep_size"], status["max_ep_size"], status["membership"]) == (3, RANKS, [0, 1, 2])
    assert [rank["state"] for rank in status["ranks"]] == ["active"] * 3 + ["standby"]
    assert [rank["device"] for rank in status["ranks"]] == list(range(RANKS))
    processes = {process.pid for process in two_ranks.processes()}
    pids = [rank["pid"] for rank in status["ranks"]]
    assert len(set(pids)) == RANKS and set(pids) <= processes
    assert status["memory"]["pid"] in processes
    assert "elasticmoe_sglang.hmm" in psutil.Process(status["memory"]["pid"]).cmdline()
    assert status["running"] is None and status["last"]["new_ep_size"] == 3

    owned = [status["placement"].count(rank) for rank in range(RANKS)]
    assert sum(owned) == EXPERTS and owned[3] == 0 and max(owned) - min(owned[:3]) <= 1
    memory = status["memory"]
    assert memory["available"] and memory["endpoint"].startswith("ipc://")
    # Every column and the dense block take what they were registered with, rounded up to the backend's granularity.
    for device, columns in zip(memory["devices"], owned, strict=True):
        by_kind = device["by_kind"]
        assert by_kind.get("column", 0) == columns * memory["column_bytes"]
        assert by_kind.get("dense", 0) == (memory["dense_bytes"] if columns else 0)
        assert device["used"] == sum(by_kind.values()) <= device["peak"] <= device["budget"]


def test_column_bytes_are_those_of_the_model(server: ElasticServer, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    weights = 3 * config["hidden_size"] * config["moe_intermediate_size"] * 4
    page = 4096
    expected = -(-config["num_hidden_layers"] * weights // page) * page
    assert server.status()["memory"]["column_bytes"] == expected


def test_a_middle_rank_retires(two_ranks: ElasticServer) -> None:
    before = two_ranks.generate(PROMPT, 24)["output_ids"]
    two_ranks.must_scale(4)
    operation = two_ranks.must_scale(retire=[2])
    assert (operation["retiring"], operation["ranks_after"]) == ([2], [0, 1, 3])
    status = two_ranks.status()
    assert status["membership"] == [0, 1, 3] and 2 not in status["placement"]
    assert status["memory"]["devices"][2]["by_kind"].get("column", 0) == 0
    assert [two_ranks.generate(PROMPT, 24)["output_ids"] for _ in range(3)] == [before] * 3
    operation = two_ranks.must_scale(retire=[1, 3])
    assert operation["ranks_after"] == [0]
    assert two_ranks.generate(PROMPT, 24)["output_ids"] == before


def test_control_requests_are_answered_at_every_size(two_ranks: ElasticServer) -> None:
    """SGLang asks all ranks and waits for all answers; inactive ranks give none."""
    for size in (3, 1, 2):
        operation = two_ranks.scale(size, wait=False)
        while two_ranks.operation(operation["operation_id"])["phase"] not in ("done", "failed", "rolled_back"):
            assert two_ranks.get("/server_info", timeout_s=10).status_code == 200
        info = two_ranks.get("/server_info", timeout_s=10).json()
        assert len(info["internal_states"]) == size
        assert two_ranks.post("/flush_cache", {}, timeout_s=10).status_code == 200


@pytest.mark.soak  # Takes minutes on two cores.
def test_sglangs_own_benchmark_loses_nothing_to_changes(two_ranks: ElasticServer, model: Path, tmp_path: Path) -> None:
    """`python -m sglang.benchmark.serving` runs while the server is scaled up and down."""
    requests_sent, results = 60, tmp_path / "results.jsonl"
    flags = ["--backend", "sglang", "--host", "127.0.0.1", "--port", str(two_ranks.port), "--model", str(model)]
    flags += ["--dataset-name", "random-ids", "--random-input-len", "48", "--random-output-len", "40"]
    flags += ["--num-prompts", str(requests_sent), "--request-rate", "6", "--random-range-ratio", "0.3"]
    flags += ["--output-file", str(results), "--output-details", "--disable-tqdm"]
    command = [sys.executable, "-m", "sglang.benchmark.serving", *flags]
    with (tmp_path / "log").open("w") as log:
        benchmark = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            settled(lambda: busy(two_ranks) or benchmark.poll() is not None, 120, "the benchmark sends requests")
            sizes = []
            while benchmark.poll() is None:
                size = (3, 1, 4, 2)[len(sizes) % 4]
                two_ranks.must_scale(size)
                sizes.append(size)
                time.sleep(0.5)
        finally:
            benchmark.kill()
            benchmark.wait()
    printed = (tmp_path / "log").read_text()
    assert benchmark.returncode == 0, printed
    found = json.loads(results.read_text().splitlines()[-1])
    assert found["completed"] == requests_sent and not any(found["errors"]), printed
    assert len(sizes) >= 3, f"only {sizes} happened meanwhile"


def busy(server: ElasticServer) -> bool:
    return any(entry["num_running_reqs"] for entry in loads_of(server).values())


def cli(*words: str, key: str | None = KEY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", *words]
    return subprocess.run(
        [*command, *(("--admin-key", key) if key else ())], capture_output=True, text=True, timeout=120
    )


def test_command_scales_and_tells(two_ranks: ElasticServer) -> None:
    here = ("--url", two_ranks.url)
    done = cli("scale", "3", "--wait", "--json", *here)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["phase"] == "done"
    status = cli("status", "--json", *here)
    assert status.returncode == 0, status.stderr
    told: dict[str, Any] = json.loads(status.stdout)
    assert told["membership"] == [0, 1, 2] == two_ranks.status()["membership"]
    retired = cli("scale", "--retire", "1", "--wait", *here)
    assert retired.returncode == 0, retired.stderr
    assert two_ranks.status()["membership"] == [0, 2]
    shown = cli("status", *here)
    assert shown.returncode == 0 and "active" in shown.stdout
    accepted = cli("scale", "2", "--json", *here)
    assert accepted.returncode == 0 and json.loads(accepted.stdout)["phase"] == "done"


@pytest.mark.parametrize(
    ("words", "key", "status", "sentence"),
    [
        (("scale", "9"), KEY, 2, "4"),
        (("scale", "--retire", "0"), KEY, 2, "0"),
        (("scale", "2"), None, 2, "key"),
        (("status",), "wrong", 2, "key"),
        (("scale", "many"), KEY, 2, "invalid int"),
    ],
)
def test_command_says_why_not(
    two_ranks: ElasticServer, words: tuple[str, ...], key: str | None, status: int, sentence: str
) -> None:
    done = cli(*words, "--url", two_ranks.url, key=key)
    assert done.returncode == status, done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_command_without_a_server() -> None:
    done = cli("status", "--url", "http://127.0.0.1:9")
    assert done.returncode == 3 and "no server answers" in done.stderr and "Traceback" not in done.stderr


def test_impossible_launches_end_with_one_message(tmp_path: Path) -> None:
    """In real launches, side by side: each imports SGLang first."""
    model = make_tiny_model(tmp_path / "model")
    foreign = make_tiny_model(tmp_path / "foreign", layers=1, experts=2)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"architectures": ["MixtralForCausalLM"]}))
    sglang = [sys.executable, "-m", "sglang.launch_server", "--device", "cpu", "--model-path"]
    ranks = ["--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4"]
    serve = [sys.executable, "-m", "elasticmoe_sglang.cli.main", "serve", "--model-path", str(model)]
    launches = {
        "MixtralForCausalLM": [*sglang, str(foreign), *ranks],
        "--tp-size 3": [*sglang, str(model), *ranks, "--tp", "3"],
        "5 is larger than": [*serve, "--ep-size", "5", "--max-ep-size", "4"],
    }
    started = {
        words: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for words, command in launches.items()
    }
    for words, process in started.items():
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 2, errors
        messages = [line for line in errors.splitlines() if line.startswith("elasticmoe: ")]
        assert len(messages) == 1 and words in messages[0], errors
        assert "Traceback" not in errors
