"""Ablations change how bytes come to a joiner, never which bytes come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from elasticmoe_sglang.hmm.layout import ColumnLayout, DenseLayout
from elasticmoe_sglang.hmm.process import HmmProcess, spawn_hmm
from elasticmoe_sglang.hmm.protocol import ModelSpec
from elasticmoe_sglang.seats.ablation import StagedCopies, StreamedCopies, connect
from elasticmoe_sglang.seats.memory import Attached, SeatMemory
from tests.helpers.leaks import no_leaks

COLUMNS = 6
# Larger than one socket's buffer, and no multiple of a page.
COLUMN = ColumnLayout.of([("0.w13_weight", (3, 41_007), torch.float32), ("0.w2_weight", (5,), torch.float32)])
DENSE = DenseLayout.of([("embed", (7, 1_003), torch.float32)])
SPEC = ModelSpec(fingerprint="f", num_columns=COLUMNS, column_bytes=COLUMN.column_bytes, dense_bytes=DENSE.dense_bytes)


@pytest.fixture
def hmm(tmp_path: Path) -> Iterator[HmmProcess]:
    with no_leaks(), spawn_hmm(f"ipc://{tmp_path}/hmm.sock", (64 << 20, 64 << 20)) as process:
        yield process


def attach(memory: SeatMemory, owned: list[int], txn: str | None) -> Attached:
    return memory.attach(
        SPEC, COLUMN, DENSE, owned=owned, txn=txn, dense_source=0, fill_dense=txn is None,
        table_device=torch.device("cpu"),
    )  # fmt: skip


def close(memory: SeatMemory) -> None:
    memory.columns.close()
    memory.dense.close()


@pytest.mark.parametrize(
    ("ablations", "backend"),
    [(set(), None), ({"standby"}, None), ({"zero-copy"}, StagedCopies), ({"handles", "standby"}, StreamedCopies)],
)
def test_a_joiner_gets_the_same_bytes(hmm: HmmProcess, ablations: set[str], backend: type | None) -> None:
    with (
        connect(hmm.endpoint, name="first", ablations=frozenset()) as first,
        connect(hmm.endpoint, name="joiner", ablations=ablations) as second,
    ):
        if backend is not None:
            assert type(second.backend) is backend
        owner = SeatMemory(first, seat=0, device=0, bytes_per_second=None, deadline_s=10)
        assert attach(owner, list(range(COLUMNS)), None).load_columns == frozenset(range(COLUMNS))
        torch.manual_seed(0)
        for view in (*owner.columns.views(COLUMN).values(), *owner.dense.views().values()):
            view.copy_(torch.randn(view.shape))
        owner.filled()
        joiner = SeatMemory(second, seat=1, device=1, bytes_per_second=None, deadline_s=10)
        attached = attach(joiner, [1, 4], first.begin("change"))
        assert attached == Attached(load_columns=frozenset(), load_dense=False)
        assert joiner.pulled_bytes == 2 * COLUMN.column_bytes + DENSE.dense_bytes
        for name, view in joiner.columns.views(COLUMN).items():
            assert torch.equal(view[[1, 4]], owner.columns.views(COLUMN)[name][[1, 4]])
        assert torch.equal(joiner.dense.views()["embed"], owner.dense.views()["embed"])
        close(joiner)
        close(owner)


def test_without_peers_a_joiner_asks_for_everything(hmm: HmmProcess) -> None:
    with (
        connect(hmm.endpoint, name="first", ablations=frozenset()) as first,
        connect(hmm.endpoint, name="joiner", ablations=frozenset()) as second,
    ):
        owner = SeatMemory(first, seat=0, device=0, bytes_per_second=None, deadline_s=10)
        attach(owner, list(range(COLUMNS)), None)
        owner.filled()
        joiner = SeatMemory(second, seat=1, device=1, bytes_per_second=None, deadline_s=10, peers=False)
        assert attach(joiner, [1, 4], first.begin("change")) == Attached(
            load_columns=frozenset({1, 4}), load_dense=True
        )
        assert joiner.pulled_bytes == 0
        joiner.filled()
        assert all(block.sealed for block in first.lookup(device=1))
        close(joiner)
        close(owner)
