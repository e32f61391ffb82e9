"""What an elastic launch makes of SGLang's arguments, and what it refuses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elasticmoe_patches import device, launch
from elasticmoe_patches.launch import elastic_config, read_model_config, shape_arguments
from elasticmoe_patches.plugin import flags_used
from elasticmoe_patches.srt.server_args import after_add_cli_args
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.errors import UnsupportedFeature, UserInputError
from elasticmoe_sglang.models.quantization import BLOCK_FP8
from tests.helpers.hub import cached_on_the_hub

pytestmark = pytest.mark.process

CONFIG = ElasticConfig(ep_size=2, max_ep_size=4)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write(tmp_path, architectures=["Qwen3MoeForCausalLM"], num_experts=16)
    return tmp_path


def write(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def sglang_arguments(model: Path | str, *flags: str) -> argparse.Namespace:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    if "--elasticmoe-ep-size" not in parser._option_string_actions:  # the hook may be installed in this process
        after_add_cli_args(None, parser)
    return parser.parse_args(["--model-path", str(model), *flags])


def test_sglang_is_shaped_to_the_capacity(model: Path) -> None:
    args = sglang_arguments(model)
    shape_arguments(args, CONFIG)
    assert (args.tp_size, args.dp_size, args.ep_size) == (4, 4, 4)
    assert args.enable_dp_attention and args.enable_dp_lm_head and args.moe_dense_tp_size == 1
    assert args.disable_shared_experts_fusion
    assert args.load_balance_method == "round_robin"


def test_redundant_experts_are_understood_in_sglangs_words(model: Path) -> None:
    sizes = ("--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4")
    args = sglang_arguments(model, *sizes, "--ep-num-redundant-experts", "6")
    config = elastic_config(args)
    assert config is not None and config.redundant_experts == 6
    assert args.ep_num_redundant_experts == 0, "SGLang's map of experts has no redundant ones"
    shape_arguments(args, config)
    both = sglang_arguments(model, *sizes, "--ep-num-redundant-experts", "6", "--elasticmoe-redundant-experts", "6")
    config = elastic_config(both)
    assert config is not None and config.redundant_experts == 6
    other = sglang_arguments(model, *sizes, "--ep-num-redundant-experts", "6", "--elasticmoe-redundant-experts", "4")
    with pytest.raises(
        UserInputError, match=r"--ep-num-redundant-experts 6 contradicts .*-redundant-experts 4.*the same"
    ):
        elastic_config(other)
    plain = sglang_arguments(model, "--ep-num-redundant-experts", "6")
    assert elastic_config(plain) is None and plain.ep_num_redundant_experts == 6, "SGLang's own without our flags"


@pytest.mark.parametrize(("experts", "redundant", "most"), [(16, 49, 48), (1024, 2049, 2048)])
def test_more_copies_than_there_can_be_are_refused(model: Path, experts: int, redundant: int, most: int) -> None:
    write(model, architectures=["Qwen3MoeForCausalLM"], num_experts=experts)
    with pytest.raises(
        UserInputError, match=f"experts {redundant} is more than the {most} copies that 4 ranks can have"
    ):
        shape_arguments(sglang_arguments(model), dataclasses.replace(CONFIG, redundant_experts=redundant))
    shape_arguments(sglang_arguments(model), dataclasses.replace(CONFIG, redundant_experts=most))


def test_redundant_experts_on_npus_are_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "on_npu", lambda: True)
    with pytest.raises(UserInputError, match="redundant-experts 2 is not supported on NPUs: rows are sorted by expert"):
        shape_arguments(sglang_arguments(model), dataclasses.replace(CONFIG, redundant_experts=2))


REPLICAS = ElasticConfig(ep_size=2, max_ep_size=4, attention_tp=2)


def test_sglang_is_shaped_to_replicas_of_several_ranks(model: Path) -> None:
    args = sglang_arguments(model)
    shape_arguments(args, REPLICAS)
    assert (args.tp_size, args.dp_size, args.ep_size) == (4, 2, 4)
    assert args.enable_dp_attention and args.moe_dense_tp_size == 1


@pytest.mark.parametrize("name", ["dp_size", "attn_dp_size"])
def test_sglangs_number_of_replicas_is_understood(model: Path, name: str) -> None:
    args = sglang_arguments(model, "--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4")
    setattr(args, name, 2)
    config = elastic_config(args)
    assert config == REPLICAS
    shape_arguments(args, config)
    assert (args.tp_size, args.dp_size, args.ep_size) == (4, 2, 4)
    assert getattr(args, "attn_dp_size", 1) == 1


def test_a_number_of_replicas_that_cannot_be_is_refused(model: Path) -> None:
    """3 replicas of 4 ranks; 2 replicas of 3 ranks that are active at the start."""
    args = sglang_arguments(model, "--elasticmoe-max-ep-size", "4", "--dp-size", "3")
    config = elastic_config(args)
    assert config is not None
    with pytest.raises(UserInputError, match="--dp-size 3 contradicts --elasticmoe-max-ep-size 4"):
        shape_arguments(args, config)
    args = sglang_arguments(model, "--elasticmoe-ep-size", "3", "--elasticmoe-max-ep-size", "4", "--dp-size", "2")
    with pytest.raises(UserInputError, match="--elasticmoe-ep-size 3 is not a multiple of --elasticmoe-attention-tp 2"):
        elastic_config(args)


@pytest.mark.parametrize(
    ("config", "flags", "words"),
    [
        ({}, ("--dp-size", "4"), "--dp-size 4 contradicts --elasticmoe-max-ep-size 4 with --elasticmoe-attention-tp 2"),
        ({}, ("--max-running-requests", "1"), "less than one request for each of 2 attention replicas"),
        ({"max_ep_size": 2}, (), "one attention replica, which leaves nothing to scale to. Give at least 4"),
    ],
)
def test_what_cannot_be_with_replicas_is_refused_with_its_reason(
    model: Path, config: dict[str, Any], flags: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserInputError, match=words):
        shape_arguments(sglang_arguments(model, *flags), replace(REPLICAS, **config))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_attention_heads": 7}, "does not divide the model's 7 attention heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, "or its 3 heads of keys and values"),
        (
            {"quantization_config": BLOCK_FP8, "hidden_size": 256, "moe_intermediate_size": 128},
            "not supported for quantised checkpoints: their blocks of 128 rows",
        ),
    ],
)
def test_models_that_cannot_be_split_are_refused(model: Path, fields: dict[str, Any], words: str) -> None:
    write(model, architectures=["Qwen3MoeForCausalLM"], num_experts=16, **fields)
    with pytest.raises(UserInputError, match=words):
        shape_arguments(sglang_arguments(model), REPLICAS)


@pytest.mark.parametrize("where", ["on_cuda", "on_npu"])
def test_replicas_of_several_ranks_are_for_cpus(model: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setattr(launch, where, lambda: True)
    with pytest.raises(UserInputError, match="--elasticmoe-attention-tp 2 is supported on the CPU only"):
        shape_arguments(sglang_arguments(model), REPLICAS)


def test_the_users_choice_stays_where_it_is_possible(model: Path) -> None:
    args = sglang_arguments(model, "--tp-size", "4", "--load-balance-method", "total_tokens")
    shape_arguments(args, CONFIG)
    assert args.load_balance_method == "total_tokens"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tp-size", "3"), "--tp-size 3 contradicts"),
        (("--dp-size", "2"), "--dp-size 2 contradicts"),
        (("--pp-size", "2"), "--pp-size 2 is not supported"),
        (("--nnodes", "2"), "one host"),
        (("--disaggregation-mode", "prefill"), "disaggregation"),
        (("--tokenizer-worker-num", "2"), "one tokenizer"),
        (("--enable-eplb",), "placement"),
        (("--quantization", "fp8"), "--quantization fp8 of an unquantised checkpoint is not supported"),
        (("--quantization", "awq"), "--quantization awq .*only unquantised weights, and fp8 in blocks of 128 x 128"),
        (("--quantization", "w8a8_int8"), "--quantization w8a8_int8 .*only unquantised weights, and fp8"),
        (("--kv-cache-dtype", "fp8_e4m3"), "--kv-cache-dtype fp8_e4m3 .*unquantised only"),
        (("--kv-cache-dtype", "fp8_e5m2"), "--kv-cache-dtype fp8_e5m2 .*unquantised only"),
        (("--lora-paths", "a=/adapter"), "LoRA adapters"),
        (("--enable-lora",), "LoRA adapters"),
        (("--return-hidden-states-mode", "last"), "lost with their rank"),
        (("--enable-return-hidden-states",), "lost with their rank"),
        (("--enable-return-routed-experts",), "recorded beside the KV cache"),
        (("--enable-custom-logit-processor",), "not carried"),
        (("--enable-streaming-session",), "lies on one rank"),
        (("--enable-strict-thinking",), "not carried to its grammar"),
        (("--is-embedding",), "only generation"),
        (("--enable-multimodal",), "read text only"),
        (("--elastic-ep-backend", "mooncake"), "exclude each other"),
        (("--elastic-ep-join-mode", "scale"), "--elastic-ep-join-mode scale .*no joining group"),
        (("--enable-elastic-expert-backup",), "the HMM holds the copies"),
        (("--enable-flexkv",), "offload of KV knows nothing of caches that change their size"),
        (("--enable-lmcache",), "offload of KV knows nothing"),
        (("--radix-cache-backend", "flexkv"), "own radix cache"),
        (("--enable-lora",), "LoRA adapters are not carried"),
        (("--lora-paths", "a=/adapters/a"), "--lora-paths .*LoRA adapters are not carried"),
        (("--load-balance-method", "follow_bootstrap_room"), "routes by rank"),
        (("--init-expert-location", "map.json"), "placement is this plugin's"),
        (("--ep-dispatch-algorithm", "dynamic"), "rows take turns among the ranks that hold an expert"),
        (("--expert-distribution-recorder-mode", "stat"), "equal run of experts"),
        (("--expert-balancedness-report-mode", "server_log"), "equal run of experts"),
        (("--max-running-requests", "3"), "--max-running-requests 3 is less than one request for each of 4 ranks"),
        (("--chunked-prefill-size", "3"), "less than one token for each of 4 ranks"),
        (("--chunked-prefill-size", "60", "--page-size", "16"), "one page of 16 tokens for each of 4 ranks.*Give 64"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(model: Path, flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        shape_arguments(sglang_arguments(model, *flags), CONFIG)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("attn_dp_size", 3, "--attn-dp-size 3 contradicts --elasticmoe-max-ep-size 4"),
        ("enable_unified_cache_external_linker", True, "--enable-unified-cache-external-linker .*offload of KV"),
        ("enable_kv_cache_sharding", True, "--enable-kv-cache-sharding .*KV of a rank is its own"),
        ("enable_paged_experts", True, "--enable-paged-experts .*every expert's column is on a rank"),
        ("enable_nvidia_megakernel", True, "--enable-nvidia-megakernel .*only this plugin's kernels read"),
        ("enable_amd_monokernel", True, "--enable-amd-monokernel .*only this plugin's kernels read"),
        ("enable_http_worker_reuseport", True, "--enable-http-worker-reuseport .*one tokenizer process"),
        ("enable_return_aux_hidden_states", True, "--enable-return-aux-hidden-states .*lost with their rank"),
        ("return_aux_hidden_state_layer_ids", [3], "--return-aux-hidden-state-layer-ids .*lost with their rank"),
        ("enable_watermark", True, "--enable-watermark .*not compared"),
    ],
)
def test_arguments_that_newer_versions_have_are_refused_too(model: Path, name: str, value: Any, words: str) -> None:
    args = sglang_arguments(model)
    setattr(args, name, value)
    with pytest.raises(UserInputError, match=words):
        shape_arguments(args, CONFIG)


def test_the_newer_name_of_the_number_of_replicas(model: Path) -> None:
    args = sglang_arguments(model)
    args.attn_dp_size = 4
    shape_arguments(args, CONFIG)
    assert (args.dp_size, args.attn_dp_size) == (4, 1)


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-running-requests", "4"),
        ("--chunked-prefill-size", "64", "--page-size", "16"),
        ("--chunked-prefill-size", "-1", "--page-size", "16"),
    ],
)
def test_limits_with_a_share_for_each_rank_are_fine(model: Path, flags: tuple[str, ...]) -> None:
    shape_arguments(sglang_arguments(model, *flags), CONFIG)


@pytest.mark.parametrize("capacity", range(2, 17))
def test_no_capacity_is_refused_for_what_it_does_not_divide(model: Path, capacity: int) -> None:
    """16 experts, 8 heads or 4096 tokens: any capacity up to the number of experts."""
    args = sglang_arguments(model)
    shape_arguments(args, ElasticConfig(ep_size=2, max_ep_size=capacity))
    assert (args.tp_size, args.dp_size, args.ep_size) == (capacity, capacity, capacity)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 3}, "3 experts, fewer than the 4 ranks"),
        (
            {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "quantization_config": {"bits": 4}},
            "quantised",
        ),
    ],
)
def test_models_that_cannot_be_served_are_refused(model: Path, config: dict[str, object], words: str) -> None:
    write(model, **config)
    with pytest.raises(UserInputError, match=words):
        shape_arguments(sglang_arguments(model), CONFIG)


def write_quantised(folder: Path, *, quantization: dict[str, object] | None = None, **changes: object) -> None:
    """A block-quantised model's config.json, with these changes of its `quantization_config` and of the rest."""
    blocks = {name: value for name, value in (BLOCK_FP8 | (quantization or {})).items() if value is not None}
    fields = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 16, "hidden_size": 256}
    write(folder, **(fields | {"moe_intermediate_size": 128, "quantization_config": blocks} | changes))


@pytest.mark.parametrize("flags", [(), ("--quantization", "fp8"), ("--fp8-gemm-backend", "triton")])
@pytest.mark.parametrize(
    "quantization", [{}, {"fmt": None}, {"scale_fmt": "ue8m0"}, {"modules_to_not_convert": ["lm_head"]}]
)
def test_block_quantised_models_are_served(
    model: Path, flags: tuple[str, ...], quantization: dict[str, object]
) -> None:
    write_quantised(model, quantization=quantization)
    args = sglang_arguments(model, *flags)
    shape_arguments(args, CONFIG)
    assert args.fp8_gemm_runner_backend == args.moe_runner_backend == "triton"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization": {"quant_method": "awq"}}, "quant_method is awq"),
        ({"quantization": {"quant_method": "gptq"}}, "quant_method is gptq"),
        ({"quantization": {"quant_method": "w8a8_int8"}}, "quant_method is w8a8_int8"),
        ({"quantization": {"quant_method": "compressed-tensors"}}, "quant_method is compressed-tensors"),
        ({"quantization": {"weight_block_size": None}}, "one scale a tensor or a channel"),
        ({"quantization": {"weight_block_size": [64, 128]}}, "in blocks of 64 x 128"),
        ({"quantization": {"weight_block_size": [1, 32]}}, "in blocks of 1 x 32"),
        ({"quantization": {"activation_scheme": "static"}}, "activation_scheme of its fp8 weights is static"),
        ({"quantization": {"fmt": "e5m2"}}, "fmt of its fp8 weights is e5m2"),
        ({"quantization_config": None, "compression_config": {"quant_method": "x"}}, "quant_method is x"),
        ({"moe_intermediate_size": 192}, "moe_intermediate_size of 192 is no multiple of 128"),
        ({"hidden_size": 64}, "hidden_size of 64 is no multiple of 128"),
    ],
)
def test_other_quantisations_are_refused_with_their_reason(model: Path, changes: dict[str, Any], words: str) -> None:
    write_quantised(model, **changes)
    with pytest.raises(UnsupportedFeature, match=words):
        shape_arguments(sglang_arguments(model), CONFIG)


def write_gpt_oss(folder: Path, **changes: object) -> None:
    write(folder, **({"architectures": ["GptOssForCausalLM"], "num_local_experts": 32} | changes))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gpt_oss_has_one_pool_and_weights_as_our_kernels_read_them(model: Path, backend: str) -> None:
    """SGLang would choose a second pool for the sliding windows and, where `triton_kernels` is installed, transposed
    experts."""
    write_gpt_oss(model)
    args = sglang_arguments(model, "--moe-runner-backend", backend)
    shape_arguments(args, CONFIG)
    assert args.moe_runner_backend == "triton" and args.disable_hybrid_swa_memory


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            "mxfp4",
            r"its quant_method is mxfp4, and a GptOssForCausalLM is served unquantised.*Mxfp4Config\(dequantize=True\)",
        ),
        ("fp8", "its quant_method is fp8, and a GptOssForCausalLM is served unquantised"),
    ],
)
def test_quantised_gpt_oss_is_refused(model: Path, method: str, words: str) -> None:
    write_gpt_oss(model, quantization_config=BLOCK_FP8 | {"quant_method": method})
    with pytest.raises(UnsupportedFeature, match=words):
        shape_arguments(sglang_arguments(model), CONFIG)


def test_gpt_oss_is_refused_on_npus(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gpt_oss(model)
    monkeypatch.setattr(device, "on_npu", lambda: True)
    with pytest.raises(UserInputError, match=r"gpt-oss is not supported on NPUs: .*no biases"):
        shape_arguments(sglang_arguments(model), CONFIG)


def test_a_second_pool_is_refused(model: Path) -> None:
    with pytest.raises(UserInputError, match=r"--swa-full-tokens-ratio 0.5 .*the pool of all layers"):
        shape_arguments(sglang_arguments(model, "--swa-full-tokens-ratio", "0.5"), CONFIG)


def test_quantised_experts_of_unknown_width(model: Path) -> None:
    write(model, architectures=["Qwen3MoeForCausalLM"], num_experts=16, quantization_config=BLOCK_FP8)
    with pytest.raises(UserInputError, match="has no 'hidden_size'"):
        shape_arguments(sglang_arguments(model), CONFIG)


def test_quantised_models_are_refused_where_no_kernel_takes_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    write_quantised(model)
    with pytest.raises(UserInputError, match=r"--fp8-gemm-backend deep_gemm .*rewrite the weights"):
        shape_arguments(sglang_arguments(model, "--fp8-gemm-backend", "deep_gemm"), CONFIG)
    args = sglang_arguments(model)
    monkeypatch.setattr(device, "on_npu", lambda: True)
    with pytest.raises(UserInputError, match="not supported on NPUs"):
        shape_arguments(args, CONFIG)
    monkeypatch.setattr(device, "on_npu", lambda: False)
    monkeypatch.setattr(device, "on_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (8, 0) if number == 3 else (9, 0))
    with pytest.raises(UserInputError, match=r"GPU 3 has compute capability 8\.0"):
        shape_arguments(args, CONFIG)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    shape_arguments(args, CONFIG)


def test_more_ranks_than_experts(model: Path) -> None:
    with pytest.raises(UserInputError, match=r"16 experts, fewer than the 17 .*max-ep-size 16 or less"):
        shape_arguments(sglang_arguments(model), ElasticConfig(ep_size=2, max_ep_size=17))


def test_one_rank_has_nothing_to_scale_to(model: Path) -> None:
    with pytest.raises(UserInputError, match="nothing to scale to"):
        shape_arguments(sglang_arguments(model), ElasticConfig(ep_size=1, max_ep_size=1))


def test_more_ranks_than_the_control_page_holds(model: Path) -> None:
    with pytest.raises(UserInputError, match="64 ranks supported"):
        shape_arguments(sglang_arguments(model), ElasticConfig(ep_size=1, max_ep_size=65))


@pytest.mark.parametrize("argv", [["--elastic-ep-backend", "elasticmoe"], ["--elastic-ep-backend=elasticmoe"]])
def test_our_backend_asks_for_an_elastic_server(argv: list[str]) -> None:
    assert flags_used(["--model-path", "x", *argv], {})
    assert not flags_used(["--elastic-ep-backend", "mooncake", "--model-path", "elasticmoe"], {})


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (("--max-ep-size", "4", "--elastic-ep-initial-size", "2"), (2, 4)),
        (("--max-ep-size", "4", "--tp-size", "2", "--dp-size", "2"), (2, 4)),
        (("--max-ep-size", "4"), (1, 4)),
        (("--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4"), (2, 4)),
        (("--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4", "--max-ep-size", "4"), (2, 4)),
    ],
)
def test_sglangs_sizes_with_our_backend(model: Path, flags: tuple[str, ...], sizes: tuple[int, int]) -> None:
    args = sglang_arguments(model, "--elastic-ep-backend", "elasticmoe", *flags)
    config = elastic_config(args)
    assert config is not None and (config.ep_size, config.max_ep_size) == sizes
    assert (args.elastic_ep_backend, args.max_ep_size, args.elastic_ep_initial_size) == (None, None, None)
    shape_arguments(args, config)
    assert (args.tp_size, args.dp_size, args.ep_size) == (4, 4, 4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "was given without a size"),
        (("--elasticmoe-max-ep-size", "4", "--max-ep-size", "8"), "--max-ep-size 8 contradicts the 4"),
        (
            ("--elasticmoe-ep-size", "2", "--elasticmoe-max-ep-size", "4", "--elastic-ep-initial-size", "3"),
            "--elastic-ep-initial-size 3 contradicts the 2",
        ),
    ],
)
def test_our_backend_without_its_sizes(model: Path, flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserInputError, match=words):
        elastic_config(sglang_arguments(model, "--elastic-ep-backend", "elasticmoe", *flags))


@pytest.mark.parametrize("flags", [(), ("--elastic-ep-backend", "mooncake", "--max-ep-size", "8")])
def test_other_launches_are_not_elastic(model: Path, flags: tuple[str, ...]) -> None:
    args = sglang_arguments(model, *flags)
    before = dict(vars(args))
    assert elastic_config(args) is None and vars(args) == before


def test_a_name_on_the_hub_is_checked_like_a_folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In a process of its own: the hub's library reads its variables when it is imported."""
    write(model, architectures=["LlamaForCausalLM"])
    environment = cached_on_the_hub(tmp_path_factory.mktemp("hub"), "someone/llama", model)
    check = (
        "from elasticmoe_patches.launch import check_model as check; from elasticmoe_sglang.config import ElasticConfig"
    )
    refused = {
        "someone/llama": "a LlamaForCausalLM cannot be served",
        "someone/else": "nor to be had from the hub",
        "someone/quantised": "someone/quantised has a hf_quant_config.json",
    }
    (model / "hf_quant_config.json").write_text("{}")
    cached_on_the_hub(Path(environment["HF_HUB_CACHE"]), "someone/quantised", model)
    for name, words in refused.items():
        command = [sys.executable, "-c", f"{check}; check({name!r}, ElasticConfig(ep_size=1, max_ep_size=2))"]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and words in done.stderr.splitlines()[-1], done.stderr


def test_a_checkpoint_that_says_elsewhere_how_it_is_quantised_is_refused(model: Path) -> None:
    """SGLang looks for NVIDIA's file where config.json says nothing, in every worker, too late to refuse a model."""
    write(model, architectures=["Qwen3MoeForCausalLM"], num_experts=16)
    (model / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(UnsupportedFeature, match=r"has a hf_quant_config\.json, as NVIDIA's modelopt writes it"):
        shape_arguments(sglang_arguments(model), CONFIG)


@pytest.mark.parametrize("name", ["s3://bucket/model", "a/b/c"])
def test_what_is_no_model_is_refused_with_its_reason(name: str) -> None:
    with pytest.raises(UserInputError, match=r"nor to be had from the hub: \S"):
        read_model_config(name)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UserInputError, match=r"has no config\.json"):
        read_model_config(str(tmp_path))
