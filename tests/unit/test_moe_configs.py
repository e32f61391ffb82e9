"""Every tuned launch configuration loads, fits the card, and is the one its model gets."""

from __future__ import annotations

import json

import pytest
import torch

from elasticmoe_kernels import ShapeError
from elasticmoe_kernels.triton.config import CONFIG_DIR, GemmConfig, MoePlan, default_plan, plan_for, tuned_entries

SHARED_MEMORY = 227 * 1024  # bytes a block may take on Hopper
FILES = sorted(CONFIG_DIR.glob("*.json"))
# name: hidden, intermediate, experts, top_k, dtype of the weights
MODELS = {
    "H2048-I768-bf16": (2048, 768, 128, 8, torch.bfloat16),  # Qwen3-30B-A3B
    "H2048-I1408-bf16": (2048, 1408, 64, 6, torch.bfloat16),  # DeepSeek-V2-Lite
    "H7168-I2048-fp8": (7168, 2048, 256, 8, torch.float8_e4m3fn),  # DeepSeek-V3
}


def test_every_model_has_its_file_and_no_file_is_unknown():
    assert {path.stem for path in FILES} == set(MODELS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_entries_fit_the_card_and_their_sizes(path):
    entries = tuned_entries(path.stem)
    assert len(entries) == len(json.loads(path.read_text())["entries"]) > 0
    assert len({(e.tokens, e.share) for e in entries}) == len(entries)
    size = MODELS[path.stem][4].itemsize
    for entry in entries:
        plan = entry.plan
        assert not plan.direct or entry.tokens <= plan.w13.block_m
        for config, tiles in ((plan.w13, 2), (plan.w2, 1)):
            activation = size if size == 2 or plan.quantize_first else 2
            stage = config.block_k * (config.block_m * activation + tiles * config.block_n * size)
            # The last stage needs no buffer of its own: stages - 1 are in flight while one is consumed.
            assert stage * (config.num_stages - 1) <= SHARED_MEMORY, (entry, config)
            if size == 1:
                assert config.block_k == 128 and 128 % config.block_n == 0, "one scale a tile and step"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_every_batch_gets_a_plan_that_serves_it(name, parts):
    hidden, inter, experts, top_k, dtype = MODELS[name]
    tuned = {(e.tokens, e.share): e.plan for e in tuned_entries(name)}
    for tokens in (1, 2, 3, 7, 16, 17, 31, 33, 100, 257, 1000, 5000, 16384, 40000):
        plan = plan_for(tokens, top_k, experts // parts, 1 / parts, hidden, inter, dtype)
        assert plan in tuned.values()
        assert not plan.direct or tokens <= plan.w13.block_m
        if (tokens, 1 / parts) in tuned:
            assert plan == tuned[tokens, 1 / parts]


def test_a_shape_nobody_tuned_gets_the_rules():
    for tokens in (1, 64, 5000):
        plan = plan_for(tokens, 4, 16, 1.0, 1024, 512, torch.bfloat16)
        assert plan == default_plan(tokens, 4, 16, fp8=False)
    half = plan_for(64, 8, 128, 1.0, 2048, 768, torch.float16)
    assert half == plan_for(64, 8, 128, 1.0, 2048, 768, torch.bfloat16)  # same widths, same tiles


def test_plans_that_cannot_run_are_refused():
    small = GemmConfig(block_m=16, block_n=32, block_k=64, num_warps=4, num_stages=3)
    large = GemmConfig(block_m=64, block_n=32, block_k=64, num_warps=4, num_stages=3)
    MoePlan(direct=False, w13=large, w2=small)
    with pytest.raises(ShapeError, match="must divide"):
        MoePlan(direct=False, w13=small, w2=large)
    with pytest.raises(ShapeError, match="equal it if direct"):
        MoePlan(direct=True, w13=large, w2=small)
