"""The shared region of a server in an HMM that outlives it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from elasticmoe_sglang.comm.server_region import format_region, open_region, release_stale_regions
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
    assert [block.name for block in client.lookup(kind="window")] == ["collective region-new"]
    assert release_stale_regions(client, "new") == 0
    assert page.read_membership().ranks == (0, 1)


def test_every_process_of_a_server_sees_the_same_page(client: HmmClient) -> None:
    first = open_region(client, CONFIG, "run")
    page = format_region(first, CONFIG)
    first.close()
    page.routing_mask = 0b101
    region = open_region(client, CONFIG, "run")
    from elasticmoe_sglang.comm.control_page import ControlPage, SharedMemory

    assert ControlPage(SharedMemory(region.fd)).routing_mask == 0b101
    region.close()
