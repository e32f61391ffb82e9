"""From our flags to the SGLang arguments of an elastic server, and what is refused.

SGLang is told tp = ep = max_ep_size with DP attention over max_ep_size / attention_tp replicas (a rank each unless
attention is tensor-parallel), so that every rank holds a share of the experts and an attention replica, or a part of
one. Features that would make ranks depend on each other in other ways are refused here, before
anything starts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from elasticmoe_patches.device import (
    check_biased_devices,
    check_fp8_devices,
    check_redundancy,
    on_cuda,
    on_npu,
)
from elasticmoe_patches.features import LAUNCH_REFUSALS
from elasticmoe_sglang.comm.control_page import MAX_COPIES
from elasticmoe_sglang.comm.membership import MAX_CAPACITY
from elasticmoe_sglang.config import ElasticConfig, flag
from elasticmoe_sglang.errors import UnsupportedFeature, UserInputError
from elasticmoe_sglang.models import architecture_of
from elasticmoe_sglang.models.base import Architecture
from elasticmoe_sglang.models.quantization import SUPPORTED, is_block_fp8

# flag -> (value that is fine, why others are not)
_REFUSED: Mapping[str, tuple[Any, str]] = {
    "pp_size": (1, "pipeline stages cannot change membership together"),
    "nnodes": (1, "one host is supported so far"),
    "moe_dp_size": (1, "experts are split over all ranks"),
    "disaggregation_mode": ("null", "prefill/decode disaggregation pins requests to ranks"),
    "tokenizer_worker_num": (1, "the coordinator lives in the one tokenizer process"),
    "detokenizer_worker_num": (1, "a moved request's output is ordered by the one detokenizer"),
    "enable_dp_attention_local_control_broadcast": (False, "the commit relies on the global control broadcast"),
    "elastic_ep_backend": ((None, "none"), "SGLang's own elastic EP and this plugin exclude each other"),
    "ep_join_mode": (None, "its standbys join by themselves, no joining group is started"),
    "enable_elastic_expert_backup": (False, "the HMM holds the copies of the experts"),
    "enable_eplb": (False, "expert placement is this plugin's"),
    "init_expert_location": ("trivial", "expert placement is this plugin's"),
    "ep_dispatch_algorithm": (None, "rows take turns among the ranks that hold an expert"),
    "expert_distribution_recorder_mode": (None, "it takes an equal run of experts for each rank's"),
    "expert_balancedness_report_mode": ("off", "it takes an equal run of experts for each rank's"),
    "speculative_algorithm": (None, "draft models are not supported"),
    "enable_hierarchical_cache": (False, "the hierarchical cache is not supported"),
    "enable_unified_cache_external_linker": (
        False,
        "its offload of KV knows nothing of caches that change their size",
    ),
    "enable_kv_cache_sharding": (False, "the KV of a rank is its own"),
    "enable_paged_experts": (False, "experts lie in columns, and every expert's column is on a rank"),
    "enable_nvidia_megakernel": (False, "experts lie in columns, which only this plugin's kernels read"),
    "enable_amd_monokernel": (False, "experts lie in columns, which only this plugin's kernels read"),
    "enable_http_worker_reuseport": (False, "the coordinator lives in the one tokenizer process"),
    "enable_flexkv": (False, "its offload of KV knows nothing of caches that change their size"),
    "enable_lmcache": (False, "its offload of KV knows nothing of caches that change their size"),
    "radix_cache_backend": (None, "KV caches that change their size need SGLang's own radix cache"),
    "quantization": ((None, "fp8"), f"only {SUPPORTED} can be served"),
    "kv_cache_dtype": (("auto", "bf16", "bfloat16"), "caches move and change their size unquantised only"),
    "load_balance_method": (("auto", "round_robin", "total_requests", "total_tokens"), "it routes by rank"),
    "enforce_shared_experts_fusion": (False, "a fused shared expert is tied to a rank"),
    "moe_runner_backend": (("auto", "triton"), "experts lie in columns, which only this plugin's kernels read"),
    "moe_a2a_backend": ("none", "tokens travel through this plugin's collectives"),
    "swa_full_tokens_ratio": (
        None,
        "layers with a sliding window keep their KV in the pool of all layers, the only one that can change its size",
    ),
    "enable_symm_mem": (False, "it needs an NCCL communicator of all ranks"),
    "enable_torch_symm_mem": (False, "it needs a communicator of all ranks"),
    "enable_mscclpp": (False, "it needs a communicator of all ranks"),
    "enable_two_batch_overlap": (False, "two collectives of one group would run side by side"),
    "enable_tp_lm_head_all_to_all": (False, "it needs an NCCL communicator of all ranks"),
    **LAUNCH_REFUSALS,
}


_REPLICA_SIZES = ("dp_size", "attn_dp_size")
"""SGLang's numbers of attention replicas."""

_MODELOPT = "hf_quant_config.json"

BACKEND = "elasticmoe"
"""Our value of SGLang's --elastic-ep-backend."""


def elastic_config(args: argparse.Namespace) -> ElasticConfig | None:
    """The elastic settings of a launch, None if it asks for none.

    They come from our flags or, with --elastic-ep-backend elasticmoe, from SGLang's --max-ep-size and
    --elastic-ep-initial-size (or --tp-size, as in SGLang). --ep-num-redundant-experts is understood with either.
    SGLang's flags are cleared in `args`: their meaning there is SGLang's own elastic EP and EPLB.

    Raises:
        UserInputError: no size was given, or the two kinds of flags contradict each other.
    """
    config = _sized_config(args)
    redundant = args.ep_num_redundant_experts
    if config is None or not redundant:
        return config
    if config.redundant_experts not in (0, redundant):
        raise UserInputError(
            f"--ep-num-redundant-experts {redundant} contradicts {flag('redundant_experts')} "
            f"{config.redundant_experts}",
            hint="Give one of them: they mean the same",
        )
    args.ep_num_redundant_experts = 0
    return replace(config, redundant_experts=redundant)


def _sized_config(args: argparse.Namespace) -> ElasticConfig | None:
    config = ElasticConfig.from_namespace(args)
    if args.elastic_ep_backend != BACKEND:
        return None if config is None else _with_replicas(args, config)
    largest, initial = args.max_ep_size, args.elastic_ep_initial_size
    if config is None:
        if largest is None:
            raise UserInputError(
                f"--elastic-ep-backend {BACKEND} was given without a size",
                hint="Add --max-ep-size and --elastic-ep-initial-size, or --elasticmoe-ep-size and "
                "--elasticmoe-max-ep-size",
            )
        initial = initial or args.tp_size
        config = ElasticConfig(ep_size=initial, max_ep_size=largest)
        for name in ("tp_size", "dp_size", "ep_size"):
            if getattr(args, name) == initial:
                setattr(args, name, 1)
    for given, ours, option in (
        (largest, config.max_ep_size, "--max-ep-size"),
        (initial, config.ep_size, "--elastic-ep-initial-size"),
    ):
        if given not in (None, ours):
            raise UserInputError(f"{option} {given} contradicts the {ours} of this plugin's flags")
    args.elastic_ep_backend = args.max_ep_size = args.elastic_ep_initial_size = None
    return _with_replicas(args, config)


def _with_replicas(args: argparse.Namespace, config: ElasticConfig) -> ElasticConfig:
    """With attention tensor parallelism where SGLang's own flags ask for it: fewer replicas than ranks.

    Raises:
        UserInputError: the sizes are no whole replicas.
    """
    for name in _REPLICA_SIZES:
        replicas, capacity = getattr(args, name, 1) or 1, config.max_ep_size
        if config.attention_tp == 1 and 1 < replicas < capacity and capacity % replicas == 0:
            return replace(config, attention_tp=capacity // replicas)
    return config


def shape_arguments(args: argparse.Namespace, config: ElasticConfig) -> None:
    """Set the SGLang arguments of an elastic server in place.

    Raises:
        UserInputError: a flag or the model is not supported, with the reason.
    """
    _refuse_unsupported(args)
    capacity = config.max_ep_size
    if capacity < 2:
        raise UserInputError(
            "--elasticmoe-max-ep-size 1 leaves nothing to scale to",
            hint="Give at least 2, or serve one rank with SGLang alone, without this plugin's flags",
        )
    if config.attention_tp > 1:
        _check_attention_tp(args, config)
    if capacity > MAX_CAPACITY:
        raise UserInputError(f"--elasticmoe-max-ep-size {capacity} is more than the {MAX_CAPACITY} ranks supported")
    # Newer versions of SGLang say attn_dp_size for the dp_size that is set here.
    sizes = ("tp_size", "dp_size", "ep_size", *(["attn_dp_size"] if hasattr(args, "attn_dp_size") else []))
    for name in sizes:
        option, given = f"--{name.replace('_', '-')}", getattr(args, name)
        replicas = name in _REPLICA_SIZES
        wanted = config.num_replicas if replicas else capacity
        if given not in (1, wanted):
            sizes_of_ours = f"--elasticmoe-max-ep-size {capacity}"
            if replicas and config.attention_tp > 1:
                sizes_of_ours += f" with --elasticmoe-attention-tp {config.attention_tp}"
            raise UserInputError(
                f"{option} {given} contradicts {sizes_of_ours}",
                hint=f"Leave {option} out: it is set to the number of {'replicas' if replicas else 'ranks'}",
            )
        setattr(args, name, wanted if name != "attn_dp_size" else 1)
    _refuse_empty_shares(args, config)
    args.enable_dp_attention = True
    args.enable_dp_lm_head = True
    args.moe_dense_tp_size = 1
    args.disable_shared_experts_fusion = True
    args.disable_custom_all_reduce = True
    if args.load_balance_method == "auto":
        args.load_balance_method = "round_robin"
    architecture, quantised = check_model(args.model_path, config, revision=getattr(args, "revision", None))
    if architecture.biased:
        check_biased_devices()
        # What SGLang chooses by itself may want the experts' weights transposed.
        args.moe_runner_backend = "triton"
    # Layers with a sliding window keep their KV in the one pool that changes its size.
    args.disable_hybrid_swa_memory = True
    if quantised:
        if config.attention_tp > 1:
            raise UserInputError(
                f"--elasticmoe-attention-tp {config.attention_tp} is not supported for quantised checkpoints: their "
                "blocks of 128 rows would be cut",
                hint="Leave the flag out, or serve an unquantised checkpoint",
            )
        _shape_fp8(args, config)
    elif args.quantization is not None:
        raise UserInputError(
            f"--quantization {args.quantization} of an unquantised checkpoint is not supported: experts lie in memory "
            "as the checkpoint has them",
            hint=f"Serve a checkpoint that is quantised. Supported: {SUPPORTED}",
        )


def _shape_fp8(args: argparse.Namespace, config: ElasticConfig) -> None:
    """Set what a block-quantised model needs.

    Raises:
        UserInputError: these devices cannot compute it, or another backend of its dense layers was asked for.
    """
    check_fp8_devices(config)
    if args.fp8_gemm_runner_backend not in ("auto", "triton"):
        raise UserInputError(
            f"--fp8-gemm-backend {args.fp8_gemm_runner_backend} is not supported by an elastic server: a backend may "
            "rewrite the weights, which other processes have mapped, or compile while it serves",
            hint="Leave the flag out: triton is used",
        )
    # What SGLang chooses by itself on newer GPUs rearranges weights after loading.
    args.fp8_gemm_runner_backend = args.moe_runner_backend = "triton"


def _refuse_unsupported(args: argparse.Namespace) -> None:
    for name, (fine, why) in _REFUSED.items():
        value = getattr(args, name, None)
        accepted = fine if isinstance(fine, tuple) else (fine,)
        if value not in accepted and value is not None:
            option = "elastic-ep-join-mode" if name == "ep_join_mode" else name.replace("_", "-")
            raise UserInputError(
                f"--{option} {value} is not supported by an elastic server: {why}",
                hint="Leave the flag out",
            )


def _check_attention_tp(args: argparse.Namespace, config: ElasticConfig) -> None:
    """Raises UserInputError where attention tensor parallelism is not supported, or cannot be for this model."""
    size, capacity = config.attention_tp, config.max_ep_size
    option = f"--elasticmoe-attention-tp {size}"
    if capacity < 2 * size:
        raise UserInputError(
            f"--elasticmoe-max-ep-size {capacity} with {option} is one attention replica, which leaves nothing to "
            "scale to",
            hint=f"Give at least {2 * size}",
        )
    if on_cuda() or on_npu():
        raise UserInputError(
            f"{option} is supported on the CPU only: the device collectives of a part of the ranks were not tried",
            hint="Leave the flag out",
        )
    model = read_model_config(args.model_path, getattr(args, "revision", None))
    heads = model.get("num_attention_heads") or size
    kv_heads = model.get("num_key_value_heads") or heads
    if heads % size or (kv_heads % size and size % kv_heads):
        raise UserInputError(
            f"{option} does not divide the model's {heads} attention heads, or its {kv_heads} heads of keys and values",
            hint="Give a size that divides both, or that the second divides",
        )


def _refuse_empty_shares(args: argparse.Namespace, config: ElasticConfig) -> None:
    """SGLang divides these limits by the number of replicas; a share of nothing fails when ranks boot, or means no
    limit at all.

    Raises:
        UserInputError: a limit has less than one request, or one page of a chunk, for each replica.
    """
    shares = config.num_replicas
    each, divisor = "ranks", "--elasticmoe-max-ep-size"
    if config.attention_tp > 1:
        each, divisor = "attention replicas", "their number"
    page = args.page_size or 1
    pages = "token" if page == 1 else f"page of {page} tokens"
    for name, least, what in (
        ("max_running_requests", shares, "request"),
        ("chunked_prefill_size", shares * page, pages),
    ):
        value = getattr(args, name)
        if value is not None and 0 < value < least:
            raise UserInputError(
                f"--{name.replace('_', '-')} {value} is less than one {what} for each of {shares} {each}",
                hint=f"Give {least} or more: it is divided by {divisor}, however many ranks are active",
            )


def read_model_config(model_path: str, revision: str | None = None) -> dict[str, Any]:
    """The model's config.json: from a folder or, for a name on the hub, from its cache or by downloading it.

    Raises:
        UserInputError: there is none.
    """
    folder = Path(model_path)
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file():
            raise UserInputError(
                f"{model_path} has no config.json", hint="Give the folder of a Hugging Face checkpoint"
            )
    else:
        path = _config_from_hub(model_path, revision)
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def _config_from_hub(name: str, revision: str | None) -> Path:
    """SGLang resolves names on the hub in each worker only, too late to refuse a model."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, those of a name ValueErrors
        reason = str(error).strip().partition("\n")[0]
        raise UserInputError(
            f"the model {name} is neither a folder nor to be had from the hub: {reason}",
            hint="Give a folder, or a name whose config.json is in the hub's cache or can be downloaded",
        ) from error


def _has_file(model_path: str, name: str, revision: str | None) -> bool:
    """Whether the folder has it, or the model on the hub: in its cache, or found by asking."""
    if Path(model_path).is_dir():
        return (Path(model_path) / name).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        hf_hub_download(model_path, name, revision=revision)
    except (EntryNotFoundError, OSError, ValueError):  # or nobody can be asked: then SGLang finds none either
        return False
    return True


def check_model(model_path: str, config: ElasticConfig, *, revision: str | None = None) -> tuple[Architecture, bool]:
    """The model's architecture, and whether its weights are block-quantised fp8.

    Raises:
        UserInputError, UnsupportedFeature: it cannot be served elastically, with the reason.
    """
    model = read_model_config(model_path, revision)
    if not model.get("quantization_config") and _has_file(model_path, _MODELOPT, revision):
        raise UnsupportedFeature(
            f"the model is quantised: {model_path} has a {_MODELOPT}, as NVIDIA's modelopt writes it",
            hint=f"Supported: {SUPPORTED}",
        )
    try:
        architecture = architecture_of(model)
        experts = architecture.experts(model)
        quantised = is_block_fp8(model, architecture)
    except KeyError as error:
        raise UserInputError(f"the config.json in {model_path} has no {error}") from error
    if experts < config.max_ep_size:
        raise UserInputError(
            f"the model has {experts} experts, fewer than the {config.max_ep_size} ranks",
            hint=f"Use --elasticmoe-max-ep-size {experts} or less",
        )
    _check_redundancy(config, experts)
    return architecture, quantised


def _check_redundancy(config: ElasticConfig, experts: int) -> None:
    most = min(MAX_COPIES, experts * (config.max_ep_size - 1))
    if config.redundant_experts > most:
        raise UserInputError(
            f"{flag('redundant_experts')} {config.redundant_experts} is more than the {most} copies that "
            f"{config.max_ep_size} ranks can have of {experts} experts",
            hint="An equal share of one or two for each rank evens out most loads",
        )
    check_redundancy(config)
