"""Putting the elastic process group under torch.distributed.

    install_backend(collective region)
    init_elastic(collective region, rank=rank, world_size=capacity)

After that `torch.distributed.new_group` with any backend name makes elastic groups: torch asks the default group, which
is ours, for its subgroups. No group of ours reads or writes a rendezvous store, so each process gets one of its own
(`HashStore`) and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from elasticmoe_sglang.comm.group import BACKEND_NAME, ElasticProcessGroup, make_group
from elasticmoe_sglang.comm.new_groups import install_new_groups
from elasticmoe_sglang.comm.object_collectives import install_object_collectives
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.errors import UserInputError

__all__ = ["BACKEND_NAME", "ElasticProcessGroup", "elastic_init_process_group", "init_elastic", "install_backend"]

_regions: dict[str, CollectiveRegion] = {}


def install_backend(region: CollectiveRegion, name: str = BACKEND_NAME) -> None:
    """Register the backend with torch.distributed for CPU tensors, and for CUDA tensors if the collective region's
    groups carry them (`cuda_group.install_cuda_groups`). Again with another collective region: that one from now on."""
    registered = name in _regions
    _regions[name] = region
    if registered:
        return

    def create(options: Any, _backend_options: Any = None) -> ElasticProcessGroup:
        current = _regions[name]
        ranks = tuple(options.global_ranks_in_group) or tuple(range(options.group_size))
        group = make_group(current, ranks, options.timeout)
        assert group is not None, "torch.distributed creates a group only on its own ranks"
        return group

    devices = ["cpu"] if region.group_type is None else ["cpu", "cuda"]
    dist.Backend.register_backend(name, create, extended_api=True, devices=devices)
    install_object_collectives()
    install_new_groups(name)


def init_elastic(
    region: CollectiveRegion, rank: int, world_size: int, *, timeout: timedelta | None = None, name: str = BACKEND_NAME
) -> None:
    """`torch.distributed.init_process_group` over the collective region. Waits for nobody.

    Args:
        rank: my rank.
        world_size: the collective region's capacity.
        timeout: of the default group, torch's own default when None; the collective region's is used where it is
        shorter.

    Raises:
        UserInputError: rank or size are not the collective region's.
    """
    if (rank, world_size) != (region.rank, region.capacity):
        raise UserInputError(
            f"rank {rank} of {world_size} on the collective region of rank {region.rank} of {region.capacity} ranks",
            hint="Ranks are ranks and the world is the capacity.",
        )
    install_backend(region, name)
    dist.init_process_group(name, store=HashStore(), world_size=world_size, rank=rank, timeout=timeout)


def elastic_init_process_group(region: CollectiveRegion) -> Callable[..., None]:
    """A stand-in for `torch.distributed.init_process_group`: same arguments, backend and rendezvous ignored."""

    def init_process_group(
        backend: str | None = None,
        init_method: str | None = None,
        timeout: timedelta | None = None,
        world_size: int = -1,
        rank: int = -1,
        **_unused: Any,
    ) -> None:
        init_elastic(region, rank, world_size, timeout=timeout)

    return init_process_group
