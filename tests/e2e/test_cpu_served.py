"""Plain SGLang on our CPU platform, no flag of ours: every greedy token equals transformers', float32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elasticmoe_sglang.tiny_model import VOCAB, Arch, make_tiny_model
from tests.helpers.reference import greedy
from tests.helpers.server import SglangServer

pytestmark = pytest.mark.e2e

NEW_TOKENS = 24
EXPERT_PARALLEL = [
    *("--tp", "2", "--dp", "2", "--ep", "2", "--enable-dp-attention", "--enable-dp-lm-head"),
    *("--moe-dense-tp-size", "1", "--load-balance-method", "round_robin"),
]
# One server start each, because a start costs most of the time. Between them: both architectures with the overlap
# schedule and without, one rank and two, page sizes 1 and 16, prompts longer than a chunk, chunks mixed with decoding.
SERVERS: dict[str, tuple[Arch, list[str]]] = {
    "qwen3_moe": ("qwen3_moe", ["--device", "cpu", "--chunked-prefill-size", "32", "--enable-mixed-chunk"]),
    "deepseek_v2-paged-no-overlap": (
        "deepseek_v2",
        ["--chunked-prefill-size", "48", "--page-size", "16", "--disable-overlap-schedule"],
    ),
    "deepseek_v2-ep2": ("deepseek_v2", EXPERT_PARALLEL),
}


def prompts() -> list[list[int]]:
    """Prompts of 1 to 250 tokens; the last two share most of their tokens with an earlier one."""
    rng = random.Random(0)
    lengths = (3, 17, 64, 5, 130, 33, 1, 250)
    made = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]
    return [*made, [*made[4][:100], 7, 8, 9], [*made[7], 5]]


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SglangServer:
    arch, args = SERVERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    model = make_tiny_model(folder / "model", arch=arch)
    return SglangServer(["--model-path", str(model), "--skip-server-warmup", *args], log=folder / "server.log")


def test_greedy_tokens_equal_transformers(server: SglangServer) -> None:
    model = Path(server.args[1])
    expected = greedy(model, prompts(), NEW_TOKENS)
    with server:
        print(f"healthy after {server.boot_s:.1f} s")
        together = in_parallel(server, prompts())
        one_by_one = [server.generate(prompt, NEW_TOKENS) for prompt in prompts()]
        cached = [answer["meta_info"]["cached_tokens"] for answer in one_by_one]
    assert [answer["output_ids"] for answer in together] == expected
    assert [answer["output_ids"] for answer in one_by_one] == expected
    if "--dp" not in server.args:  # with two ranks a repeated prompt may reach the other one
        assert cached[-1] >= 240, f"the prefix of the last prompt was not reused: {cached}"


def in_parallel(server: SglangServer, requests: Sequence[Sequence[int]]) -> list[dict[str, object]]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda prompt: server.generate(prompt, NEW_TOKENS), requests))
