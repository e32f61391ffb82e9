"""The HTTP contract and the `elasticmoe` command, on the real server with an admin key."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.elastic import SEATS, ElasticServer
from tests.helpers.load import settled

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

KEY = "open-sesame"
EXPERTS = 16
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), experts=EXPERTS)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ElasticServer]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ElasticServer(model, ["--admin-api-key", KEY], log=log, admin_key=KEY) as server:
        yield server


@pytest.fixture
def two_seats(server: ElasticServer) -> ElasticServer:
    """The server with seats 0 and 1 occupied, whatever the test before has left."""
    status = server.status()
    if status["running"]:
        server.ended(status["running"]["operation_id"])
    if status["membership"] != [0, 1]:
        server.must_scale(1)
        server.must_scale(2)
    return server


def scale(server: ElasticServer, body: object) -> requests.Response:
    return server.post("/scale_elastic_ep", body)


def test_a_change_is_accepted_and_can_be_followed(two_seats: ElasticServer) -> None:
    asked_at = time.time()
    response = scale(two_seats, {"new_ep_size": 3})
    assert response.status_code == 202
    accepted = response.json()
    assert accepted["phase"] in ("planned", "preparing") and accepted["error"] is None
    assert accepted["wish"] == {"new_ep_size": 3}
    assert (accepted["old_ep_size"], accepted["new_ep_size"]) == (2, 3)
    assert (accepted["joining"], accepted["leaving"]) == ([2], [])
    assert accepted["columns_planned"] == len(accepted["moves"]) == EXPERTS // 3
    assert accepted["created_at"] == pytest.approx(asked_at, abs=5)

    seen = {accepted["phase"]}
    while (operation := two_seats.operation(accepted["operation_id"]))["phase"] != "done":
        assert operation["error"] is None
        seen.add(operation["phase"])
        time.sleep(0.01)
    assert "preparing" in seen
    timings = operation["timings"]
    parts = sum(timings[f"{phase}_ms"] for phase in ("planned", "preparing", "committing", "finishing"))
    assert parts == pytest.approx(timings["total_ms"], abs=1)
    column_bytes = two_seats.status()["memory"]["column_bytes"]
    assert operation["columns_moved"] == operation["columns_planned"]
    assert operation["bytes_moved"] >= operation["columns_moved"] * column_bytes

    listed = two_seats.get("/elastic_ep/operations").json()["operations"]
    assert listed[0] == operation
    assert [entry["created_at"] for entry in listed] == sorted((entry["created_at"] for entry in listed), reverse=True)


def test_waiting_gives_the_ended_operation(two_seats: ElasticServer) -> None:
    response = scale(two_seats, {"new_data_parallel_size": 1, "wait": True})
    assert response.status_code == 200
    operation = response.json()
    assert operation["phase"] == "done" and operation["leaving"] == [1]
    assert operation["wish"] == {"new_ep_size": 1}


def test_a_fulfilled_wish_is_done_at_once(two_seats: ElasticServer) -> None:
    epoch = two_seats.status()["epoch"]
    response = scale(two_seats, {"new_ep_size": 2})
    assert response.status_code == 200
    assert response.json()["phase"] == "done" and response.json()["columns_planned"] == 0
    assert two_seats.status()["epoch"] == epoch


def test_one_change_at_a_time_and_none_twice(two_seats: ElasticServer) -> None:
    body = {"new_ep_size": 4, "operation_id": f"grow-{time.time_ns()}"}
    first = scale(two_seats, body)
    assert first.status_code == 202

    state = two_seats.get("/is_scaling_elastic_ep").json()
    assert state == two_seats.post("/is_scaling_elastic_ep", {}).json()
    assert state["is_scaling_elastic_ep"] and state["pending_ep_size"] == 4 and state["effective_ep_size"] == 2
    other = scale(two_seats, {"new_ep_size": 1})
    assert other.status_code == 409
    assert "EP size 4" in other.json()["error"] and body["operation_id"] in other.json()["error"]
    again = scale(two_seats, body)
    assert again.status_code in (200, 202) and again.json()["operation_id"] == body["operation_id"]
    assert again.json()["created_at"] == first.json()["created_at"]
    changed_mind = scale(two_seats, {**body, "new_ep_size": 3})
    assert changed_mind.status_code == 400 and "another wish" in changed_mind.json()["error"]

    done = scale(two_seats, {**body, "wait": True})
    assert done.status_code == 200 and done.json()["phase"] == "done"
    epoch = two_seats.status()["epoch"]
    assert scale(two_seats, body).json()["operation_id"] == body["operation_id"]
    assert two_seats.status()["epoch"] == epoch, "the same operation was carried out twice"
    state = two_seats.get("/is_scaling_elastic_ep").json()
    assert state == {
        "is_scaling_elastic_ep": False,
        "effective_ep_size": 4,
        "pending_ep_size": None,
        "scale_phase": "serving_expanded",
        "last_error": None,
    }


IMPOSSIBLE: list[tuple[object, str]] = [
    ({"new_ep_size": 0}, "positive integer"),
    ({"new_ep_size": -1}, "positive integer"),
    ({"new_ep_size": SEATS + 1}, "4"),
    ({"new_ep_size": "3"}, "positive integer"),
    ({"new_ep_size": 2.5}, "positive integer"),
    ({"new_ep_size": True}, "positive integer"),
    ({"new_ep_size": None}, "positive integer"),
    ({"new_data_parallel_size": SEATS + 1}, "4"),
    ({"retire_seats": [0]}, "0"),
    ({"retire_seats": [3]}, "3"),
    ({"retire_seats": [9]}, "9"),
    ({"retire_seats": [1, 1]}, "once|twice"),
    ({"retire_seats": []}, "retire"),
    ({"retire_seats": "1"}, "list of seat numbers"),
    ({"retire_seats": [1], "new_ep_size": 1}, "together"),
    ({}, "new_ep_size"),
    ([], "JSON object"),
    ("3", "JSON object"),
    ({"new_ep_size": 3, "wait": "yes"}, "true or false"),
    ({"new_ep_size": 3, "operation_id": "a b"}, "operation_id"),
    ({"new_ep_size": 3, "operation_id": 7}, "operation_id"),
    ({"new_ep_size": 3, "force": True}, "unknown field"),
    ({"new_ep_size": 3, "operation_id": "x" * 20_000}, "larger than"),
]


@pytest.mark.parametrize(("body", "words"), IMPOSSIBLE, ids=lambda value: json.dumps(value)[:40])
def test_the_impossible_is_refused_with_a_sentence(two_seats: ElasticServer, body: object, words: str) -> None:
    import re

    operations = two_seats.get("/elastic_ep/operations").json()
    response = scale(two_seats, body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert re.search(words, error), error
    assert two_seats.get("/elastic_ep/operations").json() == operations, "a refused request started something"


def test_what_is_not_json_is_refused(two_seats: ElasticServer) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[" * 5000):
        response = requests.post(
            two_seats.url + "/scale_elastic_ep", data=content, headers=two_seats.headers, timeout=30
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


def test_status_tells_what_is_there(two_seats: ElasticServer) -> None:
    two_seats.must_scale(3)
    settled(lambda: any(seat["state"] == "standby" for seat in two_seats.status()["seats"]), 30, "a new standby")
    status = two_seats.status()
    assert (status["ep_size"], status["max_ep_size"], status["membership"]) == (3, SEATS, [0, 1, 2])
    assert [seat["state"] for seat in status["seats"]] == ["occupied"] * 3 + ["standby"]
    assert [seat["device"] for seat in status["seats"]] == list(range(SEATS))
    processes = {process.pid for process in two_seats.processes()}
    pids = [seat["pid"] for seat in status["seats"]]
    assert len(set(pids)) == SEATS and set(pids) <= processes
    assert status["memory"]["pid"] in processes
    assert "elasticmoe_sglang.hmm" in psutil.Process(status["memory"]["pid"]).cmdline()
    assert status["running"] is None and status["last"]["new_ep_size"] == 3

    owned = [status["placement"].count(seat) for seat in range(SEATS)]
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


def test_a_middle_seat_retires(two_seats: ElasticServer) -> None:
    before = two_seats.generate(PROMPT, 24)["output_ids"]
    two_seats.must_scale(4)
    operation = two_seats.must_scale(retire=[2])
    assert (operation["leaving"], operation["seats_after"]) == ([2], [0, 1, 3])
    status = two_seats.status()
    assert status["membership"] == [0, 1, 3] and 2 not in status["placement"]
    assert status["memory"]["devices"][2]["by_kind"].get("column", 0) == 0
    assert [two_seats.generate(PROMPT, 24)["output_ids"] for _ in range(3)] == [before] * 3
    operation = two_seats.must_scale(retire=[1, 3])
    assert operation["seats_after"] == [0]
    assert two_seats.generate(PROMPT, 24)["output_ids"] == before


def test_control_requests_are_answered_at_every_size(two_seats: ElasticServer) -> None:
    """SGLang asks all ranks and waits for all answers; absent seats give none."""
    for size in (3, 1, 2):
        operation = two_seats.scale(size, wait=False)
        while two_seats.operation(operation["operation_id"])["phase"] not in ("done", "failed", "rolled_back"):
            assert two_seats.get("/server_info", timeout_s=10).status_code == 200
        info = two_seats.get("/server_info", timeout_s=10).json()
        assert len(info["internal_states"]) == size
        assert two_seats.post("/flush_cache", {}, timeout_s=10).status_code == 200


@pytest.mark.soak  # Takes minutes on two cores.
def test_sglangs_own_benchmark_loses_nothing_to_changes(two_seats: ElasticServer, model: Path, tmp_path: Path) -> None:
    """`python -m sglang.benchmark.serving` runs while the server is scaled up and down."""
    requests_sent, results = 60, tmp_path / "results.jsonl"
    flags = ["--backend", "sglang", "--host", "127.0.0.1", "--port", str(two_seats.port), "--model", str(model)]
    flags += ["--dataset-name", "random-ids", "--random-input-len", "48", "--random-output-len", "40"]
    flags += ["--num-prompts", str(requests_sent), "--request-rate", "6", "--random-range-ratio", "0.3"]
    flags += ["--output-file", str(results), "--output-details", "--disable-tqdm"]
    command = [sys.executable, "-m", "sglang.benchmark.serving", *flags]
    with (tmp_path / "log").open("w") as log:
        benchmark = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            settled(lambda: busy(two_seats) or benchmark.poll() is not None, 120, "the benchmark sends requests")
            sizes = []
            while benchmark.poll() is None:
                size = (3, 1, 4, 2)[len(sizes) % 4]
                two_seats.must_scale(size)
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
    return any(entry["num_running_reqs"] for entry in server.get("/v1/loads").json()["loads"])


def cli(*words: str, key: str | None = KEY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "elasticmoe_sglang.cli.main", *words]
    return subprocess.run(
        [*command, *(("--admin-key", key) if key else ())], capture_output=True, text=True, timeout=120
    )


def test_command_scales_and_tells(two_seats: ElasticServer) -> None:
    here = ("--url", two_seats.url)
    done = cli("scale", "3", "--wait", "--json", *here)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["phase"] == "done"
    status = cli("status", "--json", *here)
    assert status.returncode == 0, status.stderr
    told: dict[str, Any] = json.loads(status.stdout)
    assert told["membership"] == [0, 1, 2] == two_seats.status()["membership"]
    retired = cli("scale", "--retire", "1", "--wait", *here)
    assert retired.returncode == 0, retired.stderr
    assert two_seats.status()["membership"] == [0, 2]
    shown = cli("status", *here)
    assert shown.returncode == 0 and "occupied" in shown.stdout
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
    two_seats: ElasticServer, words: tuple[str, ...], key: str | None, status: int, sentence: str
) -> None:
    done = cli(*words, "--url", two_seats.url, key=key)
    assert done.returncode == status, done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr


def test_command_without_a_server() -> None:
    done = cli("status", "--url", "http://127.0.0.1:9")
    assert done.returncode == 3 and "no server answers" in done.stderr and "Traceback" not in done.stderr


def test_impossible_launches_end_with_one_message(model: Path, tmp_path: Path) -> None:
    """In real launches, side by side: each imports SGLang first."""
    foreign = make_tiny_model(tmp_path / "foreign", layers=1, experts=2)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"architectures": ["MixtralForCausalLM"]}))
    sglang = [sys.executable, "-m", "sglang.launch_server", "--device", "cpu", "--model-path"]
    seats = ["--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4"]
    serve = [sys.executable, "-m", "elasticmoe_sglang.cli.main", "serve", "--model-path", str(model)]
    launches = {
        "MixtralForCausalLM": [*sglang, str(foreign), *seats],
        "--tp-size 3": [*sglang, str(model), *seats, "--tp", "3"],
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
