"""The simulated NPU: the real torch_npu over the stand-in for CANN, computing on the host. See ../../README.md.

torch calls `autoload` in every process that imports it, as it does for torch_npu itself, by the entry point beside this
package.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

RECORD = "NPUSIM_RECORD"
"""A folder: each process leaves there which operators it ran, as `<pid>.json`."""
_EVERY_S = 1.0


def autoload() -> None:
    import torch_npu  # noqa: F401  (registers the device; this entry point may come first)

    from elasticmoe_patches.platform import torchvision_ops

    torchvision_ops.declare_if_unloadable()
    install()


@functools.cache
def install() -> None:
    """Replace torch_npu's kernels in this process."""
    from npusim_device import attention, operators, packages, triton_ascend
    from npusim_device.dispatch import register

    torch.ops.load_library(os.environ["NPUSIM_LIBRARY"])
    torch.ops.npusim.install()
    packages.install()
    register(operators.OPERATORS)
    register(attention.OPERATORS)
    attention.install_atb()
    if os.environ.get(triton_ascend.WANTED) == "1" and not _forks():
        triton_ascend.install()
    if RECORD in os.environ and not _forks():
        threading.Thread(target=_record, name="npusim-record", daemon=True).start()


def _forks() -> bool:
    """Whether this is the IMM or the HMM: they run no operator, and the IMM must have one thread to fork."""
    return any(name in word for word in sys.orig_argv for name in ("elasticmoe_patches.imm", "elasticmoe_sglang.hmm"))


def _record() -> None:
    """Write what this process has run, again and again: most processes of a server are killed in the end."""
    from npusim_device.dispatch import CHECKED, addresses, calls

    path = Path(os.environ[RECORD]) / f"{os.getpid()}.json"
    last: dict[str, int] = {}
    while True:
        time.sleep(_EVERY_S)
        now = calls()
        if now != last:
            scratch = path.with_suffix(".new")
            found = {"calls": now, "checked": dict(CHECKED), "addresses": addresses()}
            scratch.write_text(json.dumps(found, indent=1, sort_keys=True))
            scratch.rename(path)
            last = now
