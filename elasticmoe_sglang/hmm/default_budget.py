"""How much memory an HMM takes when nobody says: all that the machine's devices have."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from elasticmoe_sglang.errors import DriverError, UserInputError
from elasticmoe_sglang.hmm.vmm import acl_probe, cuda_driver

logger = logging.getLogger(__name__)

_NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""The kernel module's folder for each GPU; a container sees the host's, with or without access to them."""


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Bytes of each device, device number = index, and in words where they come from."""

    devices: tuple[int, ...]
    source: str


def default_backend() -> str:
    """ "cuda" where NVIDIA's driver has a GPU for this process, "npu" where Ascend's has an NPU, "cpu" elsewhere. Makes
    no context in this process."""
    try:
        if cuda_driver.total_memory():
            return "cuda"
    except DriverError as error:
        if _NVIDIA_GPUS.is_dir():
            logger.warning("the NVIDIA GPUs of this machine are not used: %s", error)
    if acl_probe.has_driver() and acl_probe.visible_devices() != ():
        try:
            acl_probe.total_memory()
            return "npu"
        except DriverError as error:
            logger.warning("the NPUs of this machine are not used: %s", error)
    return "cpu"


def default_budget(backend: str, devices: int | None) -> Budgets:
    """All memory of the first `devices` GPUs or NPUs (None: of each), or the machine's in `devices` equal shares (None:
    one).

    Raises:
        UserInputError: there are fewer devices, or how much memory this kind of device has is not known here.
        DriverError: backend "cuda" or "npu" without a driver or a device.
    """
    if devices is not None and devices < 1:
        raise UserInputError(f"--devices {devices} leaves no device", hint="Give at least 1.")
    if backend == "cuda":
        return Budgets(devices=_first(cuda_driver.total_memory(), devices), source="all memory of each GPU")
    if backend == "npu":
        return Budgets(devices=_first(acl_probe.total_memory(), devices), source="all memory of each NPU")
    if backend != "cpu":
        raise UserInputError(f"the memory of {backend!r} devices cannot be looked up", hint="Give --budget.")
    total, shares = psutil.virtual_memory().total, devices or 1
    source = "this machine's memory" if shares == 1 else f"{shares} equal shares of this machine's memory"
    return Budgets(devices=(total // shares,) * shares, source=source)


def _first(memory: Sequence[int], devices: int | None) -> tuple[int, ...]:
    if devices is not None and devices > len(memory):
        raise UserInputError(f"{devices} devices are asked for, and there are {len(memory)}", hint="Lower --devices.")
    return tuple(memory[:devices])
