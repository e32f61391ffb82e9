"""The examples as users run them, while the server scales: the same results as without a change, and nothing fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.server import SglangServer

pytestmark = pytest.mark.e2e

EXAMPLES = Path(__file__).parents[2] / "examples"
CHANGES = "4,1,3"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SglangServer]:
    folder = tmp_path_factory.mktemp("examples")
    model = make_tiny_model(folder / "model")
    args = ["--model-path", model, "--device", "cpu", "--max-total-tokens", "8192", "--skip-server-warmup"]
    args += ["--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4"]
    with SglangServer(args, log=folder / "server.log", start_timeout_s=400) as server:
        yield server


def run_example(name: str, server: SglangServer, sizes: str) -> dict[str, Any]:
    command = [sys.executable, str(EXAMPLES / name), "--url", server.url, "--sizes", sizes, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log_tail()}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("name", ["frontend_program.py", "openai_stream.py"])
def test_an_example_gives_the_same_while_the_server_scales(server: SglangServer, name: str) -> None:
    reference = run_example(name, server, "")
    assert reference["changes"] == []
    found = run_example(name, server, CHANGES)
    assert found["results"] == reference["results"]
    assert [change["phase"] for change in found["changes"]] == ["done"] * 3
    assert [change["new_ep_size"] for change in found["changes"]] == [4, 1, 3]
    assert found["different"] == 0 and found["runs"] >= 1
    _check_content(name, found["results"])
    # The next example starts where this one did.
    assert server.post("/scale_elastic_ep", {"new_ep_size": 2, "wait": True}).json()["phase"] == "done"


def _check_content(name: str, results: list[Any]) -> None:
    if name == "openai_stream.py":
        assert len(results) == 4 and len(set(results)) == 4 and all(results)
        return
    for result in results:
        assert result["verdict"] in ("keep it", "rewrite it", "remove it")
        assert re.fullmatch(r"v[0-9]\.[0-9]{1,3}-(alpha|beta)", result["version"])
        assert len({result[aspect] for aspect in ("style", "speed", "errors")}) == 3
