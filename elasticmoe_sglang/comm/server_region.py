"""The shared region of one server: named in the HMM, formatted by the launcher, opened by every rank."""

from __future__ import annotations

from elasticmoe_sglang.comm.control_page import ControlPage, SharedMemory
from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.comm.region import CollectiveRegion
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.hmm.client import HmmClient, RegionHandle

CHANNELS = 16


_PREFIX = "collective region-"


def _name(run_id: str) -> str:
    return f"{_PREFIX}{run_id}"


def open_region(client: HmmClient, config: ElasticConfig, run_id: str) -> RegionHandle:
    """The region of the server with this id; made by the first call."""
    return client.region(
        _name(run_id), CollectiveRegion.region_bytes(config.max_ep_size, CHANNELS, config.window_bytes)
    )


def release_stale_regions(client: HmmClient, run_id: str) -> int:
    """Give back the regions of servers that ended without doing so; an HMM that outlives its server keeps them.

    The memory goes when the last process that maps a region has ended. Returns how many there were.
    """
    stale = [
        block.block_id
        for block in client.lookup(kind="window")
        if block.name is not None and block.name.startswith(_PREFIX) and block.name != _name(run_id)
    ]
    if stale:
        client.release(stale)
    return len(stale)


def format_region(region: RegionHandle, config: ElasticConfig) -> ControlPage:
    """Before the first rank starts: inactive ranks, and the first membership in epoch 0."""
    control = CollectiveRegion.format(
        region.fd, capacity=config.max_ep_size, channels=CHANNELS, window_bytes=config.window_bytes
    )
    control.publish_membership(Membership(ranks=tuple(range(config.ep_size)), epoch=0, capacity=config.max_ep_size))
    shared = SharedMemory(region.fd)
    page = ControlPage(shared)
    shared.close_fd()
    return page
