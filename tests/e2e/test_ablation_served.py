"""A joining rank without standby, peers and memory handles joins all the same, and serves the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scaling.ablation import environment
from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.server import SglangServer

# A server of its own for what only benchmarks ask for; tests/contract/test_ablation.py is in every test run.
pytestmark = [pytest.mark.server, pytest.mark.soak]


def test_a_joining_rank_that_does_without(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    args = ["--model-path", model, "--device", "cpu", "--max-total-tokens", "4096", "--skip-server-warmup"]
    args += ["--elasticmoe-ep-size", "1", "--elasticmoe-max-ep-size", "2"]
    env = environment(["standby", "peer-copy", "handles"])
    with SglangServer(args, log=tmp_path / "server.log", start_timeout_s=400, env=env) as server:
        prompts = [f"import os  # {number}" for number in range(4)]
        expected = [server.generate(prompt, 16)["output_ids"] for prompt in prompts]
        change = server.post("/scale_elastic_ep", {"new_ep_size": 2, "wait": True}, timeout_s=300).json()
        assert change["phase"] == "done", change
        answers = [server.generate(prompt, 16) for prompt in prompts]
        assert [answer["output_ids"] for answer in answers] == expected
        assert {answer["meta_info"]["dp_rank"] for answer in answers} == {0, 1}
        log = server.log.read_text()
        # The joining rank says so itself: it read its dense weights and columns from the checkpoint.
        assert "bytes of the checkpoint to join" in log
