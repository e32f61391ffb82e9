"""What a rank imports on NVIDIA GPUs, imported without CUDA, so that the IMM can fork standbys there too.

CUDA does not survive a fork, and SGLang's imports ask it for the device's compute capability. Here a program of its
own asks, once, and torch answers the imports from what it has said. Whether that was enough is tried: a fork must be
able to compute (docs/adr/0009-standbys-on-a-gpu.md).

python -m elasticmoe_sglang.imm.gpu_imports      prints the facts, one line of JSON
"""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from elasticmoe_sglang.errors import DeviceFault
from elasticmoe_sglang.hmm.vmm import cuda_driver

logger = logging.getLogger(__name__)

FORK_SAFE_THREADS = ("jemalloc_bg_thd", "cuda")
"""Beginnings of the names of threads that libraries start when they are loaded. They hold no lock that a fork needs:
jemalloc takes its own around a fork, the driver's is asleep until there is a context."""

_ASK_S = 60.0
_TRY_S = 60.0
# torch's name of a property, CUDA's of the attribute.
_ATTRIBUTES = {
    "major": "COMPUTE_CAPABILITY_MAJOR",
    "minor": "COMPUTE_CAPABILITY_MINOR",
    "multi_processor_count": "MULTIPROCESSOR_COUNT",
    "max_threads_per_multi_processor": "MAX_THREADS_PER_MULTIPROCESSOR",
    "regs_per_multiprocessor": "MAX_REGISTERS_PER_MULTIPROCESSOR",
    "shared_memory_per_block": "MAX_SHARED_MEMORY_PER_BLOCK",
    "shared_memory_per_block_optin": "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN",
    "shared_memory_per_multiprocessor": "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR",
    "warp_size": "WARP_SIZE",
    "L2_cache_size": "L2_CACHE_SIZE",
}


class CudaAsked(RuntimeError):
    """Something that was imported uses CUDA itself."""


def facts() -> list[dict[str, Any]]:
    """Each GPU's name and properties, as torch names them. Initialises CUDA.

    Raises:
        DriverError: there is no driver or no GPU.
    """
    driver = cuda_driver.load()
    found = []
    for index in range(int(driver("cuDeviceGetCount"))):
        device = driver("cuDeviceGet", index)
        numbers = {
            name: int(
                driver(
                    "cuDeviceGetAttribute",
                    getattr(driver.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{wanted}"),
                    device,
                )
            )
            for name, wanted in _ATTRIBUTES.items()
        }
        name = driver("cuDeviceGetName", 256, device).split(b"\0")[0].decode()
        found.append({"name": name, "total_memory": int(driver("cuDeviceTotalMem", device)), **numbers})
    return found


def _ask() -> list[SimpleNamespace]:
    asked = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True, timeout=_ASK_S)
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or ["nothing"]
        raise DeviceFault(f"the program that asks for the GPUs' properties failed: {said[-1]}", code=asked.returncode)
    return [SimpleNamespace(**each) for each in json.loads(asked.stdout)]


@contextmanager
def without_cuda(gpus: list[SimpleNamespace]) -> Iterator[list[str]]:
    """Inside, torch knows these GPUs and does not initialise CUDA; yields who wanted it to, and was refused.

    What was bound to these functions at import asks torch itself from the end of the context on.
    """
    import torch

    cuda: Any = torch.cuda
    asked: list[str] = []
    inside = True

    def of(device: Any) -> SimpleNamespace:
        index = device if isinstance(device, int) else None if device is None else torch.device(device).index
        return gpus[index or 0]

    answers: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: len(gpus),
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: of(device),
        "get_device_name": lambda device=None: of(device).name,
        "get_device_capability": lambda device=None: (of(device).major, of(device).minor),
    }

    def refuse() -> None:
        asked.append("".join(traceback.format_stack(limit=6)[:-1]))
        raise CudaAsked("CUDA may not be used before the fork")

    def switching(real: Callable[..., Any], answer: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            return answer(*args, **kwargs) if inside else real(*args, **kwargs)

        return call

    real = {name: getattr(cuda, name) for name in (*answers, "_lazy_init")}
    for name, answer in (answers | {"_lazy_init": refuse}).items():
        setattr(cuda, name, switching(real[name], answer))
    try:
        yield asked
    finally:
        inside = False
        for name, function in real.items():
            setattr(cuda, name, function)


def preload_without_cuda(preload: Callable[[], None]) -> bool:
    """Import what ranks need, such that this process can fork them; False, and a line in the log, if it cannot."""
    started = time.monotonic()
    try:
        gpus = _ask()
    except (DeviceFault, OSError, ValueError, subprocess.TimeoutExpired) as error:
        return _programs_instead(str(error))
    with without_cuda(gpus) as asked:
        preload()
    if asked:
        return _programs_instead(f"an import uses CUDA:\n{asked[0]}")
    imported = time.monotonic()
    if not _fork_computes():
        return _programs_instead("a fork of this process cannot use its GPU")
    logger.info("imported in %.1f s; a fork had its GPU after %.1f s", imported - started, time.monotonic() - imported)
    return True


def _programs_instead(why: str) -> bool:
    logger.warning("standbys are programs of their own, which import SGLang for themselves: %s", why)
    return False


def _fork_computes() -> bool:
    """Whether a child can make a context and compute."""
    pid = os.fork()
    if pid == 0:
        try:
            import torch

            os._exit(0 if float(torch.ones(2, device="cuda:0").sum()) == 2.0 else 1)
        except BaseException:  # reported by the status; nothing of this process may go on in the child
            traceback.print_exc()
            os._exit(1)
    deadline = time.monotonic() + _TRY_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


if __name__ == "__main__":
    print(json.dumps(facts()))
