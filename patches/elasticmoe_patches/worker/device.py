"""What a rank on a GPU does beyond one on the CPU: its windows, and meeting the other ranks of a server's start."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from elasticmoe_sglang.comm.control_page import WorkerState
from elasticmoe_sglang.errors import UserInputError, WorkerError

if TYPE_CHECKING:
    from elasticmoe_sglang.comm.cuda_region import CudaRegion

_FIRST_RANKS_S = 600.0
_COLLECTIVES_AT_ONCE = 2
_MOST_PROGRAMS = 32


def boots_alone(worker: Any) -> bool:
    """On a GPU also the ranks of a server's start: nobody waits for another's compiling and capturing."""
    return bool(worker.client.backend.name == "cuda")


def check_collectives(worker: Any) -> None:
    """Raise what a collective on the GPU has reported since the last membership; see `CudaFabric.check`."""
    if worker.cuda is not None:
        worker.cuda.check()


def open_windows(worker: Any) -> CudaRegion | None:
    """The rank's windows, under every process group made from here on; None on the CPU. SGLang has set the device."""
    if not boots_alone(worker):
        return None
    from elasticmoe_kernels.triton.windows import WindowLayout
    from elasticmoe_sglang.comm.cuda_group import install_cuda_groups
    from elasticmoe_sglang.comm.cuda_region import CudaRegion

    config = worker.runtime.config
    attach_s = config.prepare_deadline_s
    layout = WindowLayout(capacity=config.max_ep_size, blocks=_programs(worker.device, config.ranks_per_device))
    windows = CudaRegion(
        worker.client, worker.region, device=worker.device, layout=layout, device_of=config.device_of, attach_s=attach_s
    )
    install_cuda_groups(worker.region, windows)
    return windows


def _programs(device: int, ranks_per_device: int) -> int:
    """Programs of a collective's kernel, the same on every rank.

    A program that waits for a peer keeps its multiprocessor. All ranks of the device, each with the collective that
    ends and the one that begins, must fit beside each other, or one waits for a peer that finds no place. A program
    may need a whole multiprocessor's registers.

    Raises:
        UserInputError: the ranks leave each other no room.
    """
    import torch

    count = torch.cuda.get_device_properties(device).multi_processor_count
    if "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in os.environ:  # with it, the driver counts this rank's share alone
        count //= ranks_per_device
    room = count // _COLLECTIVES_AT_ONCE
    if room < 1:
        raise UserInputError(
            f"{ranks_per_device} ranks on one GPU leave {count} multiprocessors a rank, and a collective takes "
            f"{_COLLECTIVES_AT_ONCE}",
            hint="Lower --elasticmoe-ranks-per-device",
        )
    return min(_MOST_PROGRAMS, 1 << room.bit_length() - 1)


def prepare_to_join(worker: Any) -> None:
    """Before the commit barrier, so that the commit has less to do: map the members' windows, end what runs."""
    if worker.cuda is not None:
        worker.cuda.prefetch(
            tuple(member for member in worker.join_spec.members if worker.region.control.alive(member))
        )
        worker.cuda.drain()


def await_first_members(worker: Any) -> None:
    """Return once the other ranks of the server's start have booted.

    Raises:
        WorkerError: one did not come.
    """
    control = worker.region.control
    control.set_worker_state(worker.rank, WorkerState.JOINING)
    deadline = time.monotonic() + _FIRST_RANKS_S
    waiting = set(worker.join_spec.members) - {worker.rank}
    while waiting := {other for other in waiting if control.worker(other).state < WorkerState.JOINING}:
        if time.monotonic() > deadline:
            raise WorkerError(f"ranks {sorted(waiting)} did not boot within {_FIRST_RANKS_S:.0f} s", rank=worker.rank)
        time.sleep(0.005)
