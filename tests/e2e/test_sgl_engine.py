"""An elastic `sgl.Engine` without an HTTP server: its own methods, and the calls of NVIDIA Dynamo.

Its model is a name on the hub, found in the hub's cache: what a folder does not need has to work for a name too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from elasticmoe_sglang.coordinator.routing import LEAST_PER_COLUMN
from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.hub import cached_on_the_hub

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program has seen; it has ended."""
    folder = tmp_path_factory.mktemp("engine")
    environment = cached_on_the_hub(folder / "hub", "tiny/qwen3-moe", make_tiny_model(folder / "model", experts=16))
    command = [sys.executable, "-m", "tests.helpers.engine_program", "tiny/qwen3-moe"]
    with (folder / "log").open("w") as log:
        program = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
        try:
            printed, _ = program.communicate(timeout=540)
        finally:
            ours = [process for process in psutil.process_iter() if _session(process) == program.pid]
            # Multiprocessing's resource tracker, and what removes the run folder, outlive the others for a moment.
            _, left = psutil.wait_procs(ours, timeout=10)
            for process in left:
                process.kill()
    assert program.returncode == 0, (folder / "log").read_text()[-8000:]
    assert not left, f"the Engine has left processes behind: {left}"
    answer: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return answer


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except (ProcessLookupError, PermissionError):
        return None


def test_the_operations_of_the_http_server_are_methods(seen: dict[str, Any]) -> None:
    blocking = seen["blocking"]
    state = blocking["state"]
    assert (state["is_scaling_elastic_ep"], state["effective_ep_size"], state["scale_phase"]) == (False, 2, "idle")
    operations = blocking["operations"]
    assert [(operation["phase"], operation["error"]) for operation in operations] == [("done", None)] * 3
    assert [operation["ranks_after"] for operation in operations] == [[0, 1, 2, 3], [0, 1, 3], [0, 1, 2, 3]]
    assert blocking["listed"] == [operation["operation_id"] for operation in operations][::-1]
    assert blocking["shown"] == blocking["listed"][0]
    status = blocking["status"]
    assert (status["membership"], status["topology_generation"], status["safe_to_terminate_ranks"]) == (
        [0, 1, 2, 3],
        3,
        [],
    )
    assert status["instance_id"] == state["instance_id"] == operations[0]["instance_id"]


def test_placing_by_load_is_a_method(seen: dict[str, Any]) -> None:
    assert "too few to tell how busy 16 expert columns are" in seen["blocking"]["idle"]
    placed = seen["dynamo"]["placed"]
    assert placed["observed_tokens"] >= 16 * LEAST_PER_COLUMN and placed["operation"] is None
    assert (placed["imbalance"], placed["columns"], placed["note"]) == (1.0, 0, "no swap of columns helps")
    assert placed["tokens"] == [seen["dynamo"]["tokens"]] * 96


def test_no_size_changes_the_tokens(seen: dict[str, Any]) -> None:
    tokens = [*seen["blocking"]["tokens"], seen["dynamo"]["tokens"]]
    assert len(tokens) == 5 and tokens == [tokens[0]] * 5 and len(tokens[0]) == 16


def test_what_is_impossible_raises_the_sentence(seen: dict[str, Any]) -> None:
    words = ["from 1 to 4", "positive integer, not true", 'unknown field "size"', "generation 0, the current one is 3"]
    refused = seen["blocking"]["refused"]
    assert len(refused) == len(words)
    for sentence, expected in zip(refused, words, strict=True):
        assert expected in sentence


def test_dynamo_finds_sglangs_elastic_ep(seen: dict[str, Any]) -> None:
    dynamo = seen["dynamo"]
    assert dynamo["backend"] == "elasticmoe"
    accepted, competing, impossible = dynamo["answers"]
    assert accepted["success"] and (accepted["old_ep_size"], accepted["new_ep_size"]) == (4, 2)
    assert not competing["success"] and competing["pending_ep_size"] == 2 and "one change runs" in competing["message"]
    assert not impossible["success"]
    assert dynamo["state while scaling"]["pending_ep_size"] == 2
    state = dynamo["state"]
    assert (state["effective_ep_size"], state["scale_phase"], state["last_error"]) == (2, "serving_shrunk", None)
    assert dynamo["operation"]["phase"] == "done" and dynamo["membership"] == [0]


def test_one_elastic_server_a_process(seen: dict[str, Any]) -> None:
    assert "started an elastic server already" in seen["second"]
