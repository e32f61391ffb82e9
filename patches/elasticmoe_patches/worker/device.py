"""What a rank on a GPU does beyond one on the CPU: its windows, and meeting the other ranks of a server's start."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from elasticmoe_sglang.comm.control_page import ControlPage, WorkerState
from elasticmoe_sglang.comm.launch_room import LaunchRoom
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.errors import WorkerError
from elasticmoe_sglang.hmm.client import HmmClient

if TYPE_CHECKING:
    from elasticmoe_sglang.comm.cuda_region import CudaRegion

_FIRST_RANKS_S = 600.0


def open_windows(client: HmmClient, region: CollectiveRegion, config: ElasticConfig, *, device: int) -> CudaRegion:
    """The rank's windows, under every process group made from here on."""
    from elasticmoe_kernels.triton.windows import WindowLayout
    from elasticmoe_sglang.comm.cuda_group import install_cuda_groups
    from elasticmoe_sglang.comm.cuda_region import CudaRegion

    windows = CudaRegion(
        client,
        region,
        device=device,
        layout=WindowLayout(capacity=config.max_ep_size, blocks=_programs(device, config.ranks_per_device)),
        device_of=config.device_of,
        attach_s=config.prepare_deadline_s,
    )
    install_cuda_groups(region, windows)
    return windows


def _programs(device: int, ranks_per_device: int) -> int:
    """Programs of a collective's kernel. Raises UserInputError: the device's ranks leave each other no room."""
    import torch

    count = torch.cuda.get_device_properties(device).multi_processor_count
    # With a share under MPS, the driver counts this rank's part alone.
    ranks = 1 if "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" in os.environ else ranks_per_device
    return LaunchRoom.of(count, ranks).programs


def await_first_members(control: ControlPage, rank: int, members: Iterable[int]) -> None:
    """Return once the other ranks of the server's start have booted, each by itself.

    Raises:
        WorkerError: one did not within the deadline.
    """
    deadline = time.monotonic() + _FIRST_RANKS_S
    waiting = set(members) - {rank}
    while waiting := {other for other in waiting if control.worker(other).state < WorkerState.JOINING}:
        if time.monotonic() > deadline:
            raise WorkerError(f"ranks {sorted(waiting)} did not boot within {_FIRST_RANKS_S:.0f} s", rank=rank)
        time.sleep(0.005)
