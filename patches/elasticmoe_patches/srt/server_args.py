"""Our command-line flags on SGLang's own launcher, and where SGLang's own sockets are."""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from typing import Any

from elasticmoe_patches.device import (
    budgets,
    check_device_flag,
    check_devices,
    check_hmm,
    leave_cores_to_ranks,
    on_cuda,
    on_npu,
    settle_cores,
    settle_headroom,
    static_fraction,
)
from elasticmoe_patches.launch import BACKEND, elastic_config, shape_arguments
from elasticmoe_patches.plugin import install_for_process
from elasticmoe_patches.spec import DPC, MAIN, Hooks
from elasticmoe_patches.srt.layers.moe.moe_runner.ascend import ND_ENV
from elasticmoe_sglang.config import ElasticConfig, add_arguments
from elasticmoe_sglang.errors import HmmTaken, HmmUnavailable, UserInputError
from elasticmoe_sglang.runtime import current_runtime, new_runtime

HOOKS = hook = Hooks(__name__, MAIN, scope="flags")


@hook("after", "ServerArgs.add_cli_args(parser)", expires="SGLang lets plugins declare arguments.")
def after_add_cli_args(_result: Any, parser: argparse.ArgumentParser) -> None:
    """Adds the --elasticmoe-* flags to SGLang's launcher, and our value to its --elastic-ep-backend."""
    add_arguments(parser)
    for action in parser._actions:
        if action.dest == "elastic_ep_backend" and action.choices is not None:
            action.choices = [*action.choices, BACKEND]


@hook("before", "ServerArgs.from_cli_args(cls, args)", expires="SGLang lets plugins declare arguments.")
def before_from_cli_args(cls: type, args: argparse.Namespace) -> None:
    """Reads the flags, and sets tp = dp = ep = the number of ranks before SGLang resolves its arguments."""
    try:
        config = elastic_config(args)
        if config is not None:
            prepare_launch(args, config)
    except (UserInputError, HmmUnavailable, HmmTaken) as error:
        print(f"elasticmoe: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def prepare_launch(args: argparse.Namespace, config: ElasticConfig) -> None:
    """Make this process the main process of an elastic server: SGLang's arguments, runtime, environment, hooks.

    The runtime is exported to the environment, from which every process of the server reads it.

    Raises:
        UserInputError: a flag or the model is not supported.
        HmmUnavailable: the HMM that the settings name does not answer.
    """
    shape_arguments(args, config)
    check_device_flag(getattr(args, "device", None))
    check_devices(config)
    config = settle_headroom(settle_cores(config), getattr(args, "mem_fraction_static", None))
    check_hmm(config)
    new_runtime(config).export()
    leave_cores_to_ranks(config)
    # Read by SGLang's DeepSeek model: a shared expert that every rank holds whole.
    os.environ.setdefault("SGLANG_SHARED_EXPERT_TP1", "1")
    # A rank that gives up KV capacity moves cached prefixes to other rows; only the Python core's nodes are accessible.
    os.environ["SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"] = "python"
    # The shared-memory broadcaster waits for all ranks, inactive ranks included.
    os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "false"
    # Columns hold the gate projection's rows and then the up projection's, as checkpoints do; SGLang may interleave
    # them for its own MoE.
    os.environ["SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"] = "false"
    # SGLang would size its pool by what is free after it has captured graphs; KV lies in HMM memory.
    os.environ["SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"] = "false"
    if config.ranks_per_device > 1:
        # Free memory of a device that ranks share differs while they boot.
        os.environ["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "false"
    share = config.mps_percentage()
    if share is not None and on_cuda():
        # Read by the driver when a process makes its context; the IMM and the workers inherit it.
        os.environ.setdefault("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(share))
    if on_npu():
        _prepare_npu(args, config)
    install_for_process("main")


def _prepare_npu(args: argparse.Namespace, config: ElasticConfig) -> None:
    """Settings of a server on NPUs. Raises UserInputError for NPU graphs: a collective goes through the host."""
    for name in ("cuda_graph_backend_decode", "cuda_graph_backend_prefill"):
        if getattr(args, name, None) not in (None, "disabled"):
            raise UserInputError(
                f"--{name.replace('_', '-')} {getattr(args, name)} is not supported on NPUs: collectives wait for the "
                "host, which a captured graph cannot",
                hint="Leave the flag out",
            )
    args.disable_cuda_graph = True
    if args.mem_fraction_static is None:
        args.mem_fraction_static = static_fraction(min(budgets(config)))
    # SGLang casts weights to FRACTAL_NZ unless told not to; an expert's column stays plain rows.
    os.environ[ND_ENV] = "1"


@hook(
    "replace",
    "PortArgs.init_new(server_args, dp_rank=None, worker_ports=None)",
    expires="SGLang uses IPC sockets with DP attention on one host, in a folder of the user's own.",
    scope="elastic",
    processes=MAIN | DPC,
)
def private_endpoints(server_args: Any, dp_rank: int | None = None, worker_ports: list[int] | None = None) -> Any:
    """SGLang's sockets are in the run folder, which no other user can enter.

    With DP attention SGLang opens TCP ports on the loopback interface and reads pickles from whoever connects: every
    local user could run code as the server's. Also what only connects (a rank's RPC socket) is here: otherwise
    somebody else could listen at its port.
    """
    from sglang.srt.server_args import PortArgs
    from sglang.srt.utils.network import get_free_port

    runtime = current_runtime()
    assert runtime is not None
    at = runtime.paths.sglang_endpoint
    return PortArgs(
        tokenizer_ipc_name=at("tokenizer"),
        scheduler_input_ipc_name=at("controller") if dp_rank is None else runtime.paths.rank_endpoint(dp_rank),
        detokenizer_ipc_name=at("detokenizer"),
        # Of no use: the default process group is made without a store that listens (`init_elastic`).
        nccl_port=get_free_port() if server_args.nccl_port is None else server_args.nccl_port,
        rpc_ipc_name=at("rpc"),
        metrics_ipc_name=at("metrics"),
        tokenizer_worker_ipc_name=None,
        decoupled_spec_ipc_config=None,
        load_collector_ipc_name=at("loads"),
        instance_id=uuid.uuid4().hex[:12],
    )
