"""Entry point of `sglang.srt.plugins`: SGLang calls `register` in every process that loads plugins.

What it does depends on how SGLang was started.

- Without our flags: only the hooks of scope `flags` (they add the command-line flags and read them) and, where our CPU
  platform is active, those of scope `platform`. With an SGLang version or signature that does not fit, one warning, and
  SGLang runs unmodified; only the CPU platform itself refuses to build a model then (`install_for_platform`).
- With `--elasticmoe-*` on the command line: all hooks of all processes are checked here, before any process is started;
  a mismatch ends the launch. Reading the flags then calls `install_for_process("main")`.
- In a child process of such a launch (ELASTICMOE_CONFIG is set): `install_for_process` with the name of that process.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise

from elasticmoe_patches import preflight
from elasticmoe_patches.catalogue import all_hooks, select
from elasticmoe_patches.launch import BACKEND
from elasticmoe_patches.spec import PROCESSES, HookSpec, Process, Scope
from elasticmoe_patches.targets import sglang_version
from elasticmoe_sglang.config import FLAG_PREFIX
from elasticmoe_sglang.errors import HookError
from elasticmoe_sglang.runtime import ENV_CONFIG

logger = logging.getLogger(__name__)

PROCESS_ENV = "ELASTICMOE_PROCESS"
"""Environment variable with the name of a child process (main, dpc, worker or standby); without it a child is a
worker."""
_named: Process | None = None


def register() -> None:
    """Install what this process needs; ends it where our flags are used and something does not fit."""
    if ENV_CONFIG in os.environ:
        install_for_process(process_name())
        return
    elastic = flags_used(sys.argv[1:], os.environ)
    platform = platform_active()
    try:
        preflight.check_version()
        if elastic:
            check_all()
        scopes: tuple[Scope, ...] = ("platform", "both") if platform else ()
        if multiprocessing.parent_process() is None:
            scopes = ("flags", *scopes)  # they import SGLang's entry points, which its child processes do without
        preflight.install(select("main", scopes), "main")
    except HookError as error:
        if elastic:
            preflight.fail_closed(error)
        logger.warning("elasticmoe is inactive, SGLang runs without it: %s", error)


def check_all() -> None:
    """Check the hooks of all processes and what they use, before any process is started.

    Raises:
        HookError: one error that lists all mismatches.
    """
    preflight.check_version()
    preflight.check(spec for spec in all_hooks() if platform_active() or spec.scope != "platform")
    preflight.check_uses()


def install_for_platform(process: Process) -> tuple[HookSpec, ...]:
    """Install the hooks of the CPU platform; ends the process on a mismatch, since that platform must not run without.

    For `SRTPlatform.init_backend`, which SGLang calls in every scheduler process before the model is built.
    """
    try:
        preflight.check_version()
        return preflight.install(select(process, ("platform", "both")), process)
    except HookError as error:
        preflight.fail_closed(error)


def install_for_process(process: Process) -> tuple[HookSpec, ...]:
    """Install all hooks of an elastic launch which a process of this name needs; ends the process on a mismatch.

    Idempotent, and additive: a standby that is assigned a rank calls it again with the new name. Returns the hooks that
    this call installed.
    """
    global _named
    _named = process
    try:
        preflight.check_version()
        return preflight.install(select(process, elastic_scopes()), process)
    except HookError as error:
        preflight.fail_closed(error)


def verify_for_process(process: Process) -> None:
    """Check once the server is up that every hook is in place, and log it; ends the process and its children where one
    is not."""
    try:
        preflight.verify_installed(select(process, elastic_scopes()), process)
    except HookError as error:
        preflight.end_process(error)
    report_hooks(process)


def report_hooks(process: Process) -> None:
    """The one line in the log of each process that says what is in place; to be called where logging is set up."""
    from elasticmoe_patches.device import memory_backend

    version, count = sglang_version(), len(select(process, elastic_scopes()))
    logger.info("%s: %d hooks in SGLang %s, memory backend %s", process, count, version, memory_backend())


def elastic_scopes() -> tuple[Scope, ...]:
    """The scopes that belong to an elastic launch on this machine."""
    return ("flags", "platform", "both", "elastic") if platform_active() else ("flags", "both", "elastic")


def flags_used(argv: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether this launch asks for elasticity: one of our flags, our backend of SGLang's elastic EP, or the
    configuration a parent has set."""
    backend = f"--elastic-ep-backend={BACKEND}" in argv or ("--elastic-ep-backend", BACKEND) in pairwise(argv)
    return backend or ENV_CONFIG in environ or any(argument.startswith(FLAG_PREFIX) for argument in argv)


def process_name() -> Process:
    """The name of this process.

    What it, or the parent it was forked from, last called `install_for_process` with; else what PROCESS_ENV says; else
    `worker` in a child started by multiprocessing and `main` elsewhere.

    Raises:
        HookError: PROCESS_ENV names no process.
    """
    if _named is not None:
        return _named
    name = os.environ.get(PROCESS_ENV)
    if name is None:
        return "main" if multiprocessing.parent_process() is None else "worker"
    if name not in PROCESSES:
        raise HookError(f"{PROCESS_ENV}={name!r} names no process", hint=f"It must be one of {', '.join(PROCESSES)}")
    return name


def platform_active() -> bool:
    """Whether SGLang runs on the CPU platform of this package."""
    from sglang.srt.platforms import current_platform

    return type(current_platform).__module__.startswith("elasticmoe_patches.platform")
