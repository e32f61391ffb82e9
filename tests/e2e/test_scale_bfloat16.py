"""bfloat16: moving a running request adds nothing to the rounding of the same server without changes.

Greedy tokens may differ where two are close, so texts are not compared: what the elastic server generated is given to
plain SGLang (one rank, no flag of ours) as a prompt, which says how likely each of these tokens is. Decoding and
prefilling round differently, and ranks add up experts in another order than one rank does. How much that explains, the
same elastic server shows while it stays at each of the sizes; what requests show that were moved, in the tokens after
their move, must come from the same distribution.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import get_args

import pytest

from elasticmoe_sglang.tiny_model import Arch, make_tiny_model
from tests.helpers import npusim
from tests.helpers.elastic import RANKS, ElasticServer
from tests.helpers.record import record
from tests.helpers.rounding import against, check, move_streams, some_prompts, streams_at_rest
from tests.helpers.server import SglangServer
from tests.helpers.shared import LIMITS

pytestmark = [pytest.mark.server, pytest.mark.timeout(1200), pytest.mark.soak]


def elastic_server(model: Path, device: str, log: Path) -> ElasticServer:
    if device == "cpu":
        return ElasticServer(model, log=log)
    return ElasticServer(
        model,
        [*LIMITS, "--dtype", "bfloat16", "--elasticmoe-standbys", str(RANKS - 1)],
        log=log,
        device=device,
        kv_tokens=16384,
        python=npusim.python_or_skip(),
        env=npusim.environment(devices=RANKS),
    )


CASES = [*((arch, "cpu") for arch in get_args(Arch)), ("qwen3_moe", "npu"), ("deepseek_v2", "npu")]


@pytest.mark.parametrize(("arch", "device"), CASES)
def test_moved_requests_round_as_those_that_stay(arch: Arch, device: str, tmp_path: Path) -> None:
    """On simulated NPUs arithmetic is the CPU's, operator by operator; the pools, the copies and the way are not."""
    model = make_tiny_model(tmp_path / "model", arch=arch, dtype="bfloat16")
    rng = random.Random(21)
    prompts = some_prompts(rng)
    with elastic_server(model, device, tmp_path / "server.log") as server:
        at_rest = streams_at_rest(server, prompts, RANKS)
        moved = move_streams(server, prompts, rng)
    args = ["--model-path", str(model), "--device", "cpu", "--skip-server-warmup", "--max-total-tokens", "16384"]
    with SglangServer(args, log=tmp_path / "plain.log") as server:
        found = against(server, moved, at_rest)
    print(found)
    record("bfloat16-logprobs", arch if device == "cpu" else f"{arch} on simulated NPUs", found)
    check(found)
