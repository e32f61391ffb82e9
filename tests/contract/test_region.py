"""The collective region of a server in an HMM that outlives it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe_sglang.comm.region import format_region, open_region, release_stale_regions
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.process import spawn_hmm

CONFIG = ElasticConfig(ep_size=2, max_ep_size=4, window_bytes=1 << 16)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[HmmClient]:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    with spawn_hmm(f"ipc://{folder}/hmm.sock", [1 << 20]) as hmm, HmmClient(hmm.endpoint, name="test") as client:
        yield client


def test_a_new_server_gives_back_what_a_dead_one_left(client: HmmClient) -> None:
    open_region(client, CONFIG, "old").close()
    region = open_region(client, CONFIG, "new")
    page = format_region(region, CONFIG)
    region.close()
    assert release_stale_regions(client, "new") == 1
    assert [block.name for block in client.lookup(kind="window")] == ["collective-region-new"]
    assert release_stale_regions(client, "new") == 0
    assert page.read_membership().ranks == (0, 1)


def test_a_region_costs_what_was_written(client: HmmClient) -> None:
    config = ElasticConfig(ep_size=2, max_ep_size=64)
    region = open_region(client, config, "large")
    format_region(region, config)
    assert region.nbytes > 8 << 30
    status = client.status()
    assert os.fstat(region.fd).st_blocks * 512 == status.host_bytes < 32 << 20
    assert [device.used for device in status.devices] == [0], "no device's budget covers it"
    # A message takes the pages it lies in, and no process can change the size under the others.
    with region.map() as memory:
        memory[-(1 << 20) :] = bytes(1 << 20)
    assert client.status().host_bytes == status.host_bytes + (1 << 20)
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 0)
    region.close()
    client.release([region.block_id])
    assert client.status().host_bytes == 0


def test_every_process_of_a_server_sees_the_same_page(client: HmmClient) -> None:
    first = open_region(client, CONFIG, "run")
    page = format_region(first, CONFIG)
    first.close()
    page.set_kv(3, capacity=100, used=7, cached=2)
    region = open_region(client, CONFIG, "run")
    from elasticmoe_sglang.comm.control_page import ControlPage, SharedMemory

    assert ControlPage(SharedMemory(region.fd)).kv(3) == (100, 7, 2)
    region.close()
