"""Ranks of a starting server attach to the HMM together, in whatever order they come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from elasticmoe_sglang.comm.membership import Membership
from elasticmoe_sglang.config import ElasticConfig
from elasticmoe_sglang.coordinator.memory import release_leftovers
from elasticmoe_sglang.errors import UserInputError, WorkerError
from elasticmoe_sglang.hmm.client import HmmClient
from elasticmoe_sglang.hmm.layout import ColumnLayout, DenseLayout
from elasticmoe_sglang.hmm.process import spawn_hmm
from elasticmoe_sglang.planner import TURNS, View, initial_placement
from elasticmoe_sglang.planner.placement import turns_of
from elasticmoe_sglang.wire.to_hmm import ModelSpec
from elasticmoe_sglang.worker.weights import Attached, WorkerWeights

RANKS = 4
COLUMNS = ColumnLayout.of([("0.w13_weight", (8, 4), torch.float32), ("0.w2_weight", (4, 4), torch.float32)])
DENSE = DenseLayout.of([("embed", (32, 4), torch.float32)])
SPEC = ModelSpec(
    fingerprint="test", num_columns=RANKS, column_bytes=COLUMNS.column_bytes, dense_bytes=DENSE.dense_bytes
)


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    with spawn_hmm(f"ipc://{folder}/hmm.sock", [1 << 20] * RANKS) as hmm:
        yield hmm.endpoint


def attach(endpoint: str, rank: int, found: dict[int, torch.Tensor], ranks_per_device: int = 1) -> None:
    with HmmClient(endpoint, name=f"rank-{rank}") as client:
        device = rank // ranks_per_device
        memory = WorkerWeights(client, rank=rank, device=device, bytes_per_second=None, deadline_s=20)
        attached = memory.attach(
            SPEC,
            COLUMNS,
            DENSE,
            owned=[rank],
            txn=None,
            dense_source=0,
            fill_dense=rank == 0,
            table_device=torch.device("cpu"),
        )
        assert attached.load_dense == (rank == 0)
        assert attached.load_columns == {rank}
        dense = memory.dense.views()["embed"]
        if attached.load_dense:
            dense.fill_(7.0)
        memory.filled()
        found[rank] = dense.clone()


@pytest.mark.parametrize("ranks_per_device", [1, 2, 4])
def test_waiting_ranks_do_not_wait_for_each_other(endpoint: str, ranks_per_device: int) -> None:
    """Ranks 1 to 3 make their blocks before rank 0 fills its own; each once waited for whichever block came first, and
    one on rank 0's device made the block that rank 0 was to fill, and waited for another device's."""
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=attach, args=(endpoint, rank, found, ranks_per_device)) for rank in range(RANKS)]
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.5)
    threads[0].start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == list(range(RANKS))
    assert all(bool((dense == 7.0).all()) for dense in found.values())


def test_blocks_that_may_be_rolled_back_are_not_shared(endpoint: str) -> None:
    """The rollback of a change that has failed waits for a rank that does not answer, and a recovery does not wait for
    it: the columns which the change put onto a device must not be mapped there by the rank that is booted."""
    with HmmClient(endpoint, name="coordinator") as coordinator, HmmClient(endpoint, name="first") as first:
        source = WorkerWeights(first, rank=0, device=0, bytes_per_second=None, deadline_s=20)
        whole = attach_to(source, owned=[0, 1, 2, 3], txn=None, fill_dense=True)
        assert whole.load_columns == {0, 1, 2, 3}
        for column in range(RANKS):
            source.columns.views(COLUMNS)["0.w13_weight"][column].fill_(column + 1.0)
        source.filled()
        failed, recovery = coordinator.begin("failed"), coordinator.begin("recovery")
        with HmmClient(endpoint, name="second") as second:
            earlier = WorkerWeights(second, rank=1, device=1, bytes_per_second=None, deadline_s=20)
            assert not attach_to(earlier, owned=[1, 2], txn=failed).load_columns
        with HmmClient(endpoint, name="third") as third:
            booted = WorkerWeights(third, rank=1, device=1, bytes_per_second=None, deadline_s=20)
            assert not attach_to(booted, owned=[1], txn=recovery).load_columns
            booted.pull({2: 0}, recovery)
            coordinator.rollback(failed)
            coordinator.commit(recovery)
            held = coordinator.lookup(kind="column", device=1)
            assert sorted(block.column for block in held if block.column is not None) == [1, 2]
            for column in (1, 2):
                assert torch.all(booted.columns.views(COLUMNS)["0.w13_weight"][column] == column + 1.0)


def test_ranks_of_a_replica_have_parts_of_the_dense_weights(endpoint: str) -> None:
    """Ranks 0 to 3 are two replicas of two ranks, each replica on one device: rank 2 copies rank 0's part, rank 3 rank
    1's, and a device holds both."""
    with HmmClient(endpoint, name="coordinator") as coordinator:
        kept = []
        for rank in range(RANKS):
            client = HmmClient(endpoint, name=f"rank-{rank}")
            kept.append(client)
            memory = WorkerWeights(
                client, rank=rank, device=rank // 2, shard=rank % 2, bytes_per_second=None, deadline_s=20
            )
            found = memory.attach(
                SPEC,
                COLUMNS,
                DENSE,
                owned=[rank],
                txn=None,
                dense_source=0,
                fill_dense=rank < 2,
                table_device=torch.device("cpu"),
            )
            assert found.load_dense == (rank < 2)
            dense = memory.dense.views()["embed"]
            if found.load_dense:
                dense.fill_(rank + 5.0)
            memory.filled()
            assert bool((dense == rank % 2 + 5.0).all())
        held = [(block.device, block.shard) for block in coordinator.lookup(kind="dense")]
        assert sorted(held) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        view = View(
            membership=Membership(ranks=(0, 1), epoch=1, capacity=RANKS), placement=initial_placement(RANKS, (0, 1))
        )
        config = ElasticConfig(ep_size=2, max_ep_size=RANKS, ranks_per_device=2, attention_tp=2)
        release_leftovers(coordinator, view, config)
        assert [(b.device, b.shard) for b in coordinator.lookup(kind="dense")] == [(0, 0), (0, 1)]
        with pytest.raises(UserInputError, match="a block of kind column is no part of the dense weights"):
            coordinator.allocate(0, "column", columns=[0], shard=1)
        for client in kept:
            client.close()


def test_a_shared_column_is_served_in_its_turns(endpoint: str) -> None:
    with HmmClient(endpoint, name="first") as client:
        memory = WorkerWeights(client, rank=0, device=0, bytes_per_second=None, deadline_s=20)
        owned, shared = [0, 1, 2], {1: (0, 2), 2: (2, 3)}
        attached = attach_to(memory, owned=owned, txn=None, fill_dense=True, shared=shared, turns=TURNS)
        assert attached.load_columns == {0, 1, 2}
        memory.filled()
        table = memory.slot_table
        address = table.data_ptr()
        assert (table.shape, table.dtype) == ((TURNS, RANKS + 1), torch.int32)

        def served(column: int) -> list[int]:
            assert set(table[:, column].tolist()) <= {-1, column}
            return (table[:, column] == column).nonzero().flatten().tolist()

        assert served(0) == list(range(TURNS)) and served(3) == served(RANKS) == []
        assert served(1) == list(turns_of(1, 0, 2)) and served(2) == list(turns_of(2, 2, 3))
        memory.switch([0, 1], {0: (1, 2)})
        assert served(0) == list(turns_of(0, 1, 2)) and served(1) == list(range(TURNS)) and served(2) == []
        assert memory.slot_table.data_ptr() == address, "captured graphs read it there"
        with pytest.raises(WorkerError, match=r"columns \[3\] cannot be served: they are not mapped"):
            memory.switch([3], {3: (0, 2)})


def test_copies_on_a_server_without_turns_are_refused(endpoint: str) -> None:
    with HmmClient(endpoint, name="first") as client:
        memory = WorkerWeights(client, rank=0, device=0, bytes_per_second=None, deadline_s=20)
        attach_to(memory, owned=[0], txn=None, fill_dense=True)
        memory.filled()
        with pytest.raises(WorkerError, match=r"columns \[0\] have copies, and the tables of this rank have no turns"):
            memory.switch([0], {0: (0, 2)})


def attach_to(
    memory: WorkerWeights, *, owned: list[int], txn: str | None, fill_dense: bool = False, **turns: Any
) -> Attached:
    return memory.attach(
        SPEC,
        COLUMNS,
        DENSE,
        owned=owned,
        txn=txn,
        dense_source=0,
        fill_dense=fill_dense,
        table_device=torch.device("cpu"),
        **turns,
    )
