"""Our command-line flags on SGLang's own launcher."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from elasticmoe_patches.device import check_devices, check_hmm, on_cuda
from elasticmoe_patches.launch import BACKEND, elastic_config, shape_arguments
from elasticmoe_patches.plugin import install_for_process
from elasticmoe_patches.spec import MAIN, Hooks
from elasticmoe_sglang.config import ElasticConfig, add_arguments
from elasticmoe_sglang.errors import HmmUnavailable, UserInputError
from elasticmoe_sglang.runtime import new_runtime

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
    except (UserInputError, HmmUnavailable) as error:
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
    check_devices(config)
    check_hmm(config)
    new_runtime(config).export()
    # Read by SGLang's DeepSeek model: a shared expert that every rank holds whole.
    os.environ.setdefault("SGLANG_SHARED_EXPERT_TP1", "1")
    # A rank that gives up KV capacity moves cached prefixes to other rows; only the Python core's nodes are accessible.
    os.environ["SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"] = "python"
    # The shared-memory broadcaster waits for all ranks, inactive ranks included.
    os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "false"
    # Columns hold the gate projection's rows and then the up projection's, as checkpoints do; SGLang may interleave
    # them for its own MoE.
    os.environ["SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"] = "false"
    if config.ranks_per_device > 1:
        # Free memory of a device that ranks share differs while they boot.
        os.environ["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "false"
    share = config.mps_percentage()
    if share is not None and on_cuda():
        # Read by the driver when a process makes its context; the IMM and the workers inherit it.
        os.environ.setdefault("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", str(share))
    install_for_process("main")
