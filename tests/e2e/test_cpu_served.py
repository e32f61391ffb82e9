"""Plain SGLang on our CPU platform, no flag of ours: every greedy token equals transformers', float32."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elasticmoe_sglang.tiny_model import VOCAB, Arch, make_tiny_model
from tests.e2e.conftest import Corpora
from tests.helpers.reference import greedy
from tests.helpers.server import SglangServer
from tests.helpers.shared import Shared

pytestmark = pytest.mark.server

NEW_TOKENS = 24
EXPERT_PARALLEL = [
    *("--tp", "2", "--dp", "2", "--ep", "2", "--enable-dp-attention", "--enable-dp-lm-head"),
    *("--moe-dense-tp-size", "1", "--load-balance-method", "round_robin"),
]
SERVERS: dict[str, tuple[Arch, list[str]]] = {
    "qwen3_moe": ("qwen3_moe", ["--device", "cpu", "--chunked-prefill-size", "32", "--enable-mixed-chunk"]),
    "deepseek_v2-paged-no-overlap": (
        "deepseek_v2",
        ["--chunked-prefill-size", "48", "--page-size", "16", "--disable-overlap-schedule"],
    ),
    "deepseek_v2-ep2": ("deepseek_v2", [*EXPERT_PARALLEL, "--chunked-prefill-size", "96", "--page-size", "16"]),
}
"""One server start each, because a start costs most of the time; they are for `make soak`. In every test run there is
the plain server that is the reference of other tests: no overlap schedule, one rank, page size 1, chunks mixed with
decoding."""


def prompts() -> list[list[int]]:
    """Prompts of 1 to 250 tokens; the last two share most of their tokens with an earlier one."""
    rng = random.Random(0)
    lengths = (3, 17, 64, 5, 130, 33, 1, 250)
    made = [[rng.randrange(3, VOCAB) for _ in range(length)] for length in lengths]
    return [*made, [*made[4][:100], 7, 8, 9], [*made[7], 5]]


@pytest.mark.shared("plain")
def test_the_reference_of_other_tests_equals_transformers(shared: Shared, corpora: Corpora) -> None:
    check_greedy_tokens(shared.plain("qwen3_moe"))
    corpus = corpora["qwen3_moe"]
    cases = [*corpus.cases[:8], *corpus.long[:2]]
    expected = greedy(corpus.model, [case.prompt for case in cases], NEW_TOKENS)
    for case, ids in zip(cases, expected, strict=True):
        assert case.ids[:NEW_TOKENS] == ids[: len(case.ids)]


@pytest.mark.soak
@pytest.mark.parametrize("name", SERVERS)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    arch, args = SERVERS[name]
    model = make_tiny_model(tmp_path / "model", arch=arch)
    with SglangServer(
        ["--model-path", str(model), "--skip-server-warmup", *args], log=tmp_path / "server.log"
    ) as server:
        print(f"healthy after {server.boot_s:.1f} s")
        check_greedy_tokens(server)


def check_greedy_tokens(server: SglangServer) -> None:
    """Together and one by one; with one rank a repeated prompt is found in the cache."""
    expected = greedy(Path(server.args[1]), prompts(), NEW_TOKENS)
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
