"""The real server on a GPU, two ranks sharing it: it grows and shrinks while streams decode, and no token changes.

Needs MPS (`scripts/gpu_all.sh` starts it).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elasticmoe_patches.device import mps_runs
from elasticmoe_sglang.tiny_model import make_tiny_model
from tests.helpers.elastic import ElasticServer, commit_time
from tests.helpers.load import Load, settled

pytestmark = [pytest.mark.gpu, pytest.mark.server, pytest.mark.timeout(300)]

LANES, TOKENS = 6, 500
FLAGS = (
    *("--dtype", "float32", "--disable-cuda-graph", "--attention-backend", "triton"),
    *("--sampling-backend", "pytorch", "--context-length", "4096", "--mem-fraction-static", "0.5"),
    *("--elasticmoe-ranks-per-device", "2", "--elasticmoe-standbys", "1"),
)
ENVIRONMENT = {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch"}
"""SGLang's fused operators take no float32."""


@pytest.fixture(params=[False, True], ids=["booting", "hot"])
def hot(request: pytest.FixtureRequest) -> bool:
    """Whether the other rank is kept booted; it joins again after it has retired then."""
    return bool(request.param)


@pytest.fixture
def server(hot: bool, tmp_path: Path) -> Iterator[ElasticServer]:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if not mps_runs():
        pytest.skip("two ranks on a GPU need MPS: scripts/gpu_all.sh starts it")
    model = make_tiny_model(tmp_path / "model", arch="qwen3_moe")
    log = tmp_path / "server.log"
    flags = [*FLAGS, "--elasticmoe-hot-standbys", str(int(hot))]
    with ElasticServer(model, flags, log=log, ep_size=1, capacity=2, device="cuda", env=ENVIRONMENT) as made:
        yield made


def prompt(lane: int) -> list[int]:
    return [(lane * 7919 + 31 * at) % 500 + 5 for at in range(8 + 5 * lane)]


def test_changes_under_load_keep_every_token(server: ElasticServer, hot: bool) -> None:
    with Load(server.url) as load:
        still = [load.start(prompt(lane), TOKENS) for lane in range(LANES)]
        load.wait(still)
        expected = [list(stream.ids) for stream in still]
        state = "hot" if hot else "standby"
        settled(lambda: any(rank["state"] == state for rank in server.status()["ranks"]), 90, f"a {state} rank")
        for size in (2, 1, 2) if hot else (2, 1):
            moving = [load.start(prompt(lane), TOKENS) for lane in range(LANES)]
            for stream in moving:
                stream.wait_for_tokens(TOKENS // 10, 60)
            operation = server.must_scale(size)
            assert operation["ranks_after"] == list(range(size))
            load.wait(moving)
            for stream, ids in zip(moving, expected, strict=True):
                stream.check(ids)
            assert any(stream.ended_at > commit_time(operation) for stream in moving), "none ran through it"
    status = server.status()
    assert status["ranks"][0]["first_uses"] is not None
