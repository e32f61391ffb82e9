"""Our command-line flags on SGLang's own launcher (mirrors sglang/srt/server_args.py)."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from elasticmoe_patches.spec import HookSpec
from elasticmoe_sglang.config import ElasticConfig, add_arguments
from elasticmoe_sglang.errors import HmmUnavailable, UserInputError


def after_add_cli_args(_result: Any, parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)


def before_from_cli_args(cls: type, args: argparse.Namespace) -> None:
    """Shape the arguments and put the runtime into the environment, where every process of the server finds it."""
    from elasticmoe_patches.device import check_devices, check_hmm
    from elasticmoe_patches.launch import shape_arguments
    from elasticmoe_patches.plugin import install_for_process
    from elasticmoe_sglang.runtime import new_runtime

    try:
        config = ElasticConfig.from_namespace(args)
        if config is None:
            return
        shape_arguments(args, config)
        check_devices(config)
        check_hmm(config)
        runtime = new_runtime(config)
    except (UserInputError, HmmUnavailable) as error:
        print(f"elasticmoe: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    runtime.export()
    # Read by SGLang's DeepSeek model: a shared expert that every rank holds whole.
    os.environ.setdefault("SGLANG_SHARED_EXPERT_TP1", "1")
    # A rank that gives up KV capacity moves cached prefixes to other rows; only this core's nodes can be reached.
    os.environ["SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"] = "python"
    # The shared-memory broadcaster waits for all ranks, inactive ranks included.
    os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "false"
    # Columns hold the commit barrier's rows and then the up projection's, as checkpoints do; SGLang may mix them for
    # its own MoE.
    os.environ["SGLANG_OPT_FUSE_SWIGLU_INTERLEAVED"] = "false"
    if config.ranks_per_device > 1:
        # Free memory of a device that ranks share differs while they boot.
        os.environ["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "false"
    install_for_process("main")


HOOKS = (
    HookSpec(
        target="sglang.srt.server_args.ServerArgs.add_cli_args",
        kind="after",
        hook=f"{__name__}:after_add_cli_args",
        signature="(parser)",
        reason="Adds the --elasticmoe-* flags to SGLang's launcher.",
        expires="SGLang lets plugins declare arguments.",
        scope="flags",
        processes=frozenset(("main",)),
    ),
    HookSpec(
        target="sglang.srt.server_args.ServerArgs.from_cli_args",
        kind="before",
        hook=f"{__name__}:before_from_cli_args",
        signature="(cls, args)",
        reason="Reads the flags, and sets tp = dp = ep = the number of ranks before SGLang resolves its arguments.",
        expires="SGLang lets plugins declare arguments.",
        scope="flags",
        processes=frozenset(("main",)),
    ),
)
