"""The examples as users run them, while the server scales: the same results as without a change, and nothing fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.elastic import ElasticServer
from tests.helpers.shared import KEY, Shared

pytestmark = [pytest.mark.server, pytest.mark.shared("steady")]

EXAMPLES = Path(__file__).parents[2] / "examples"
CHANGES = "4,1,3"


@pytest.fixture
def server(shared: Shared) -> ElasticServer:
    return shared.steady()


def run_example(name: str, server: ElasticServer, sizes: str) -> dict[str, Any]:
    command = [sys.executable, str(EXAMPLES / name), "--url", server.url, "--sizes", sizes, "--json"]
    environment = {**os.environ, "ELASTICMOE_ADMIN_KEY": KEY}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log_tail()}"
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("name", ["frontend_program.py", "openai_stream.py"])
def test_an_example_gives_the_same_while_the_server_scales(server: ElasticServer, name: str) -> None:
    reference = run_example(name, server, "")
    assert reference["changes"] == []
    found = run_example(name, server, CHANGES)
    assert found["results"] == reference["results"]
    assert [change["phase"] for change in found["changes"]] == ["done"] * 3
    assert [change["new_ep_size"] for change in found["changes"]] == [4, 1, 3]
    assert found["different"] == 0 and found["runs"] >= 1
    _check_content(name, found["results"])


def _check_content(name: str, results: list[Any]) -> None:
    if name == "openai_stream.py":
        assert len(results) == 4 and len(set(results)) == 4 and all(results)
        return
    for result in results:
        assert result["verdict"] in ("keep it", "rewrite it", "remove it")
        assert re.fullmatch(r"v[0-9]\.[0-9]{1,3}-(alpha|beta)", result["version"])
        assert len({result[aspect] for aspect in ("style", "speed", "errors")}) == 3
