"""The real server on a GPU, two ranks sharing it: it grows and shrinks while streams decode, and no token changes.

Needs MPS (`scripts/gpu_all.sh` starts it).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe_sglang.tiny_model import Arch, make_tiny_model
from tests.helpers.elastic import ElasticServer, commit_time
from tests.helpers.load import Load, settled
from tests.helpers.reference import dequantised, greedy
from tests.helpers.shared_gpu import need_shared_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.server, pytest.mark.timeout(300)]

LANES, TOKENS = 6, 500
FLAGS = (
    *("--dtype", "float32", "--disable-cuda-graph", "--attention-backend", "triton"),
    *("--sampling-backend", "pytorch", "--context-length", "4096", "--mem-fraction-static", "0.5"),
    *("--elasticmoe-ranks-per-device", "2", "--elasticmoe-standbys", "1"),
)
ENVIRONMENT = {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch"}
"""SGLang's fused operators take no float32."""
FP8_FLAGS = (
    *("--dtype", "bfloat16", "--cuda-graph-bs-decode", "1", "2", "4", "8", "--attention-backend", "triton"),
    *("--context-length", "4096", "--mem-fraction-static", "0.5"),
    *("--elasticmoe-ranks-per-device", "2", "--elasticmoe-standbys", "1", "--elasticmoe-hot-standbys", "1"),
)
FP8_TOKENS = 64
FP8_AGREE: dict[Arch, float] = {"qwen3_moe": 0.55, "deepseek_v3": 0.33}
"""At how many of the positions float32's greedy token must be the server's best one, too. A tiny model's wide logits
turn rounding into other tokens: emulated on a CPU (inputs of every projection through e4m3 by token and group of 128,
the rest in bfloat16) it is 0.72 and 0.49; with wrong scales or slots it would be chance, 1 in 1024."""
FP8_KERNELS = ("_direct_kernel", "_sorted_kernel", "_quantize_kernel", "_w8a8_block_fp8_matmul")


@pytest.fixture(params=[False, True], ids=["booting", "hot"])
def hot(request: pytest.FixtureRequest) -> bool:
    """Whether the other rank is kept booted; it joins again after it has retired then."""
    return bool(request.param)


@pytest.fixture
def server(hot: bool, tmp_path: Path) -> Iterator[ElasticServer]:
    need_shared_gpu()
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


@pytest.mark.parametrize("arch", ["qwen3_moe", "deepseek_v3"])
def test_block_quantised_weights_with_graphs_through_changes(arch: Arch, tmp_path: Path) -> None:
    """bfloat16: the server's choices are the reference's at every size, and no fp8 kernel is loaded while it serves."""
    need_shared_gpu()
    model = make_tiny_model(tmp_path / "model", arch=arch, quantization="fp8", dtype="bfloat16")
    texts = [prompt(lane) for lane in range(LANES)]
    answers = greedy(dequantised(model, tmp_path / "wide"), texts, FP8_TOKENS)
    with (
        ElasticServer(
            model, FP8_FLAGS, log=tmp_path / "server.log", ep_size=1, capacity=2, device="cuda", kv_tokens=16384
        ) as server,
        Load(server.url) as load,
    ):
        settled(lambda: any(rank["state"] == "hot" for rank in server.status()["ranks"]), 90, "a hot rank")
        for size in (2, 1, 2):
            assert agreement(server, texts, answers) >= FP8_AGREE[arch]
            moving = [load.start(text, TOKENS) for text in texts]
            for stream in moving:
                stream.wait_for_tokens(TOKENS // 10, 60)
            server.must_scale(size)
            load.wait(moving)
            for stream in moving:
                stream.check()
        assert agreement(server, texts, answers) >= FP8_AGREE[arch]
        late = server.log_lines("a kernel was loaded while serving")
        assert not [line for line in late if any(kernel in line for kernel in FP8_KERNELS)]


def agreement(server: ElasticServer, texts: list[list[int]], answers: list[list[int]]) -> float:
    """The part of the answers' tokens that are the server's first choice behind what is in front of them."""
    agreed = []
    for text, ids in zip(texts, answers, strict=True):
        answer = server.generate([*text, *ids], 1, return_logprob=True, logprob_start_len=0, top_logprobs_num=1)
        best = answer["meta_info"]["input_top_logprobs"][len(text) :]
        agreed += [top[0][1] == token for top, token in zip(best, ids, strict=True)]
    print(f"{statistics.mean(agreed):.2f} of {len(agreed)} tokens")
    return statistics.mean(agreed)
