"""The checks of `elasticmoe doctor` on a machine with NVIDIA GPUs, for the ranks that are wanted there.

Facts come from `python -m elasticmoe_patches.gpu_probe`, run as a program: it makes a CUDA context, and a library that
cannot be loaded must not break this command.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import msgspec

from elasticmoe_sglang.answers import ask_program
from elasticmoe_sglang.cli.doctor_checks import Check, device_memory
from elasticmoe_sglang.comm.launch_room import LaunchRoom
from elasticmoe_sglang.errors import UserInputError

PROBE_TIMEOUT_S = 120.0
LEAST_BYTES_A_RANK = 1 << 30
"""For each rank, before any weight or KV. On an H100 a context with SGLang's kernels takes 612 MiB, the graphs of 16
layers 120 MiB, windows 33 MiB."""


class GpuDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU: bytes free and in all; multiprocessors."""

    name: str
    free: int
    total: int
    multiprocessors: int


class GpuProbe(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `elasticmoe_patches.gpu_probe`; its fields are described there."""

    cuda: str = ""
    driver: str = ""
    error: str = ""
    kernels: str = ""
    kernels_error: str = ""
    mps: bool = False
    devices: tuple[GpuDevice, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The ranks for which a machine is judged."""

    max_ep_size: int = 1
    ranks_per_device: int = 1

    @property
    def devices(self) -> int:
        return -(-self.max_ep_size // self.ranks_per_device)


def probe() -> GpuProbe:
    """Run the program; its failure is the probe's `error`."""
    found = ask_program("elasticmoe_patches.gpu_probe", answer=GpuProbe, timeout_s=PROBE_TIMEOUT_S)
    return GpuProbe(error=found) if isinstance(found, str) else found


def checks(found: GpuProbe, wanted: Wanted) -> list[Check]:
    """Whether the wanted ranks would find what they need on these GPUs."""
    usable = not found.error and bool(found.devices)
    first = [
        Check(
            name="CUDA",
            ok=usable,
            found=f"{found.cuda}, the driver's {found.driver}" if usable else found.error or "no GPU",
            fix="" if usable else "nvidia-smi   # the driver must be at least as new as torch's CUDA",
        ),
        Check(
            name="sglang-kernel",
            ok=not found.kernels_error,
            found=found.kernels_error or found.kernels,
            fix="" if not found.kernels_error else f"{sys.executable} -m pip install --force-reinstall sglang-kernel",
        ),
    ]
    if not usable:
        return first
    return [*first, _count(found, wanted), _mps(found, wanted), _memory(found, wanted), _room(found, wanted)]


def _count(found: GpuProbe, wanted: Wanted) -> Check:
    here, needed = len(found.devices), wanted.devices
    ok = here >= needed
    ranks = f"{wanted.max_ep_size} ranks, {wanted.ranks_per_device} a GPU"
    return Check(
        name="GPUs",
        ok=ok,
        found=f"{here}, for {ranks}" if ok else f"{here}; {ranks}, need {needed}",
        fix="" if ok else f"elasticmoe serve --max-ep-size {here * wanted.ranks_per_device} ...",
    )


def _mps(found: GpuProbe, wanted: Wanted) -> Check:
    needed = wanted.ranks_per_device > 1
    ok = found.mps or not needed
    fix = (
        "export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps; mkdir -p /tmp/mps; "
        "nvidia-cuda-mps-control -d"
    )
    text = "answers" if found.mps else "does not answer"
    return Check(name="MPS", ok=ok, found=text if needed else f"{text}, not needed", fix="" if ok else fix)


def _memory(found: GpuProbe, wanted: Wanted) -> Check:
    devices = found.devices[: wanted.devices]
    return device_memory("GPU", devices, LEAST_BYTES_A_RANK * wanted.ranks_per_device, tool="nvidia-smi")


def _room(found: GpuProbe, wanted: Wanted) -> Check:
    least = min(device.multiprocessors for device in found.devices[: wanted.devices])
    try:
        room = LaunchRoom.of(least, wanted.ranks_per_device)
    except UserInputError as error:
        return Check(
            name="multiprocessors", ok=False, found=error.what, fix="elasticmoe serve --ranks-per-device 1 ..."
        )
    return Check(
        name="multiprocessors",
        ok=True,
        found=f"{least}: {room.multiprocessors} a rank, collectives of {room.programs} programs",
    )
