"""bfloat16 with CUDA graphs on a GPU: moving a running request adds nothing to the rounding of the same server without
changes; see tests/e2e/test_scale_bfloat16.py.

Needs MPS (`scripts/gpu_all.sh` starts it).
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from elasticmoe_sglang.tiny_model import Arch, make_tiny_model
from tests.helpers.elastic import ElasticServer
from tests.helpers.load import settled
from tests.helpers.record import record
from tests.helpers.rounding import against, check, move_streams, some_prompts, streams_at_rest
from tests.helpers.server import SglangServer
from tests.helpers.shared_gpu import need_shared_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.server, pytest.mark.timeout(500)]

RANKS = 2
COMMON = (
    *("--dtype", "bfloat16", "--cuda-graph-bs-decode", "1", "4", "16", "--attention-backend", "triton"),
    *("--sampling-backend", "pytorch", "--context-length", "4096", "--mem-fraction-static", "0.5"),
)


@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v2"])
def test_moved_requests_round_as_those_that_stay(arch: Arch, tmp_path: Path) -> None:
    need_shared_gpu()
    model = make_tiny_model(tmp_path / "model", arch=arch, dtype="bfloat16")
    rng = random.Random(21)
    prompts = some_prompts(rng)
    own = ("--elasticmoe-ranks-per-device", str(RANKS), "--elasticmoe-standbys", "1", "--elasticmoe-hot-standbys", "1")
    log = tmp_path / "server.log"
    with ElasticServer(
        model, [*COMMON, *own], log=log, ep_size=1, capacity=RANKS, device="cuda", kv_tokens=16384
    ) as server:
        settled(lambda: any(rank["state"] == "hot" for rank in server.status()["ranks"]), 90, "a hot rank")
        at_rest = streams_at_rest(server, prompts, RANKS)
        moved = move_streams(server, prompts, rng, (1, RANKS))
    args = ["--model-path", str(model), "--device", "cuda", "--skip-server-warmup", "--max-total-tokens", "16384"]
    with SglangServer([*args, *COMMON], log=tmp_path / "plain.log") as plain:
        found = against(plain, moved, at_rest)
    print(found)
    record("bfloat16-logprobs", f"{arch} on {torch.cuda.get_device_name()}", found)
    check(found)
