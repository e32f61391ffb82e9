"""Seats of a starting server attach to the HMM together, in whatever order they come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.layout import ColumnLayout, DenseLayout
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.hmm.protocol import ModelSpec
from elasticmoe_sglang.seats.memory import SeatMemory

SEATS = 4
COLUMNS = ColumnLayout.of([("0.w13_weight", (8, 4), torch.float32), ("0.w2_weight", (4, 4), torch.float32)])
DENSE = DenseLayout.of([("embed", (32, 4), torch.float32)])
SPEC = ModelSpec(
    fingerprint="test", num_columns=SEATS, column_bytes=COLUMNS.column_bytes, dense_bytes=DENSE.dense_bytes
)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    with spawn_hmm(f"ipc://{folder}/hmm.sock", [1 << 20] * SEATS) as hmm:
        yield hmm.endpoint


def attach(endpoint: str, seat: int, found: dict[int, torch.Tensor], seats_per_device: int = 1) -> None:
    with HmmClient(endpoint, name=f"seat-{seat}") as client:
        device = seat // seats_per_device
        memory = SeatMemory(client, seat=seat, device=device, bytes_per_second=None, deadline_s=20)
        attached = memory.attach(
            SPEC,
            COLUMNS,
            DENSE,
            owned=[seat],
            txn=None,
            dense_source=0,
            fill_dense=seat == 0,
            table_device=torch.device("cpu"),
        )
        assert attached.load_dense == (seat == 0)
        assert attached.load_columns == {seat}
        dense = memory.dense.views()["embed"]
        if attached.load_dense:
            dense.fill_(7.0)
        memory.filled()
        found[seat] = dense.clone()


@pytest.mark.parametrize("seats_per_device", [1, 2, 4])
def test_waiting_seats_do_not_wait_for_each_other(endpoint: str, seats_per_device: int) -> None:
    """Seats 1 to 3 make their blocks before seat 0 fills its own; each once waited for whichever block came first, and
    one on seat 0's device made the block that seat 0 was to fill, and waited for another device's."""
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=attach, args=(endpoint, seat, found, seats_per_device)) for seat in range(SEATS)]
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.5)
    threads[0].start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == list(range(SEATS))
    assert all(bool((dense == 7.0).all()) for dense in found.values())
