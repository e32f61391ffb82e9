"""The launch configurations for Ascend, each with its model scaled down, start and change on simulated NPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from elasticmoe_sglang.launch_config import load_launch_config
from elasticmoe_sglang.tiny_model import VOCAB, Arch, make_tiny_model
from tests.helpers import npusim
from tests.helpers.elastic import ElasticServer

pytestmark = [pytest.mark.server, pytest.mark.soak, pytest.mark.timeout(900)]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ARCHES: dict[str, Arch] = {
    "qwen3-30b-a3b": "qwen3_moe",
    "deepseek-v2-lite": "deepseek_v2",
    "deepseek-v3": "deepseek_v3",
}
RANKS = 2
_BUDGET = str(1 << 30)
_TOKENS = 16384


@pytest.mark.parametrize("model", ARCHES)
@pytest.mark.parametrize("device", ["ascend-910b", "ascend-910c"])
def test_it_starts_and_changes(device: str, model: str, tmp_path: Path) -> None:
    """Its flags and variables; smaller are model, ranks and memory."""
    python = npusim.python_or_skip(triton_ascend=True)
    config = load_launch_config(CONFIGS / device / f"{model}.json")
    tiny = make_tiny_model(tmp_path / "model", arch=ARCHES[model], dtype="bfloat16")
    smaller = {
        "--model-path": None,
        "--device": None,
        "--ep-size": None,
        "--max-ep-size": None,
        "--elasticmoe-device-budget": _BUDGET,
        "--context-length": "4096",
    }
    given = iter(config.to_argv())
    flags = {flag: smaller.get(flag, value) for flag, value in zip(given, given, strict=True)}
    args = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    assert config.environment.items() >= {("ELASTICMOE_NPU_GEMM", "triton")}
    variables = {**config.environment, **npusim.TRITON_ASCEND, "TASK_QUEUE_ENABLE": "0"}
    with ElasticServer(
        tiny,
        args,
        log=tmp_path / "server.log",
        ep_size=1,
        capacity=RANKS,
        device="npu",
        kv_tokens=_TOKENS,
        python=python,
        env={**npusim.environment(devices=RANKS), **variables},
    ) as server:
        prompt = [number % VOCAB for number in range(3, 150)]
        for size in (2, 1):
            assert len(server.generate(prompt, 8)["output_ids"]) == 8
            server.must_scale(size)
        assert len(server.generate(prompt, 8)["output_ids"]) == 8
